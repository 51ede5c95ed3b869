# docker build -t tokengrain .
# docker run --rm -v "$PWD/runs:/app/runs" tokengrain demo
#
# For a GPU, build with `--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128` and run with `--gpus all`.
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX"
COPY . /src
RUN pip install --no-cache-dir '/src[all]' && rm -rf /src
WORKDIR /app
ENTRYPOINT ["tokengrain"]
CMD ["--help"]
