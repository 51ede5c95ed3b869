#!/usr/bin/env bash
# Run the GPU tests and the standard benchmark set on a CUDA machine that has PyTorch, transformers, accelerate
# and peft (TRL is measured too where it is installed). Writes JSON to the folder given.
#     bash benchmarks/gpu.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"; print(torch.cuda.get_device_name())' || exit 1
status=0
python3 -m pytest -q -m cuda -o addopts= --junitxml="$out/gpu_tests.xml" tests/scoring || status=1
python3 -m benchmarks.preference_step standard --device cuda --output "$out" || status=1
echo "results in $out (status $status)"
exit $status
