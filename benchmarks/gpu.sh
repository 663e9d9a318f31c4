#!/usr/bin/env bash
# Everything about CUDA that needs a GPU, in one command: correctness, then figures.
#   benchmarks/gpu.sh               checks and figures, nothing recorded
#   benchmarks/gpu.sh --record      the same; rows to benchmarks/results/, tables rendered
#   benchmarks/gpu.sh --rehearse    the same lines where there is no GPU, small, in a few minutes
# Needs one NVIDIA GPU of compute capability 8.0 or higher and a checkout after `make setup`;
# liger-kernel, if installed, gets its column. Each step writes runs/gpu/STEP.log, runs at most ten
# minutes and does not stop those after it; the exit code is not zero if any failed. The guesses
# behind the steps' names are for an H100 and add up to about 25 minutes, most of it compilation.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
case "$mode" in
  "" | --record | --rehearse) ;;
  *)
    echo "usage: benchmarks/gpu.sh [--record | --rehearse]" >&2
    exit 2
    ;;
esac
if [ "$#" -gt 1 ]; then
  echo "gpu.sh: got $# arguments, expected one at most; give --record or --rehearse" >&2
  exit 2
fi

python=("${PYTHON:-.venv/bin/python}")
logs=runs/gpu
record=()
size=()
views=()
marks="cuda"
if [ "$mode" = --rehearse ]; then
  python+=(-m benchmarks.fake_cuda)
  logs=runs/gpu-rehearsal
  size=(--tiny)
  views=(--quick --n 1)
  marks="cuda and not slow"
elif [ "$mode" = --record ]; then
  record=(--record)
fi
mkdir -p "$logs"
passed=()
failed=()

step() { # NAME COMMAND...
  local name=$1 started=$SECONDS result=ok
  shift
  if timeout --kill-after=20 600 "$@" >"$logs/$name.log" 2>&1; then
    passed+=("$name")
  else
    result="FAILED ($?)"
    failed+=("$name")
    tail -n 15 "$logs/$name.log"
  fi
  printf '%-16s %-14s %5d s   %s\n' "$name" "$result" $((SECONDS - started)) "$logs/$name.log"
}

if [ "$mode" != --rehearse ]; then
  "${python[@]}" - <<'CHECK'
import torch

if not torch.cuda.is_available():
    raise SystemExit("gpu.sh: no CUDA device is visible; use --rehearse without one")
major, minor = torch.cuda.get_device_capability()
name = torch.cuda.get_device_name()
if (major, minor) < (8, 0):
    raise SystemExit(f"gpu.sh: got {name} of compute capability {major}.{minor}, expected 8.0")
print(f"{name}, compute capability {major}.{minor}, torch {torch.__version__}")
CHECK
fi

pytest=(-m pytest -q -m "$marks" -p no:cacheprovider)
step kernels "${python[@]}" "${pytest[@]}" --ignore=tests/integration/test_cuda_job.py    # 3 min
step whole-job "${python[@]}" "${pytest[@]}" tests/integration/test_cuda_job.py           # 5 min
step imagenet "${python[@]}" -m benchmarks imagenet "${size[@]}" "${record[@]}"           # 7 min
step kd-loss "${python[@]}" -m benchmarks kd-loss-gpu "${size[@]}" "${record[@]}"         # 2 min
step views "${python[@]}" -m benchmarks views --device cuda "${views[@]}" "${record[@]}"  # 1 min
step ring "${python[@]}" -m benchmarks ring "${size[@]}" "${record[@]}"                   # 1 min
step cuda-facts "${python[@]}" -m benchmarks cuda-facts "${size[@]}" "${record[@]}"       # 4 min
step sampler "${python[@]}" -m benchmarks sampler "${size[@]}" "${record[@]}"             # 4 min
if [ "$mode" = --record ]; then
  step render "${python[@]}" -m benchmarks render
fi

echo "passed: ${passed[*]:-none}"
echo "failed: ${failed[*]:-none}"
[ "${#failed[@]}" -eq 0 ]
