#!/usr/bin/env bash
# Everything about CUDA that needs a GPU, in one command: correctness, then figures.
#   benchmarks/gpu.sh [--record]
# Needs a checkout with the package installed (make setup) and, for its row, liger-kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
"$python" -m pytest -q -m cuda
"$python" -m benchmarks kd-loss-gpu "$@"
"$python" -m benchmarks sampler "$@"
"$python" -m benchmarks views "$@"
"$python" -m benchmarks ring "$@"
