#!/usr/bin/env bash
# Everything about CUDA that needs a GPU, in one command: correctness, then figures.
#   benchmarks/gpu.sh               checks and figures, nothing recorded
#   benchmarks/gpu.sh --record      the same; rows to benchmarks/results/, tables rendered
#   benchmarks/gpu.sh --rehearse    the same lines where there is no GPU, small, in a few minutes
# Needs one NVIDIA GPU of compute capability 8.0 or higher and a checkout after `make setup`;
# liger-kernel and DALI, if installed, get their rows. The steps are sorted by value. Each writes
# runs/gpu/STEP.log, takes at most eight minutes (pieces and rivals-sampler 15) and does not stop
# those after it; after 40 minutes in all no further step begins. Started again, the script skips the
# steps that passed at the same commit. At the end runs/gpu/summary.md has the figures, and the exit
# code is not zero if a step failed or is left. The minutes beside the steps are guesses for an H100.
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
logs=${LOGS:-runs/gpu}
record=()
size=()
views=()
marks="cuda"
if [ "$mode" = --rehearse ]; then
  python+=(-m benchmarks.fake_cuda)
  size=(--tiny)
  views=(--quick --n 1)
  marks="cuda and not slow"
  if [ -z "${LOGS:-}" ]; then # A rehearsal skips nothing.
    logs=runs/gpu-rehearsal
    rm -rf "$logs"
  fi
elif [ "$mode" = --record ]; then
  record=(--record)
fi
mkdir -p "$logs"
: >"$logs/steps.txt"
stamp="$(git rev-parse HEAD 2>/dev/null || echo unknown) $mode"
budget=${BUDGET_S:-2400}
passed=()
failed=()
left=()

note() { # NAME RESULT SECONDS
  printf '%-16s %-14s %5d s   %s\n' "$1" "$2" "$3" "$logs/$1.log"
  printf '%s\t%s\t%d\n' "$1" "$2" "$3" >>"$logs/steps.txt"
}

step() { # NAME COMMAND...
  local name=$1 started=$SECONDS result=ok limit=$((budget - SECONDS)) most=480
  shift
  case "$name" in pieces | rivals-sampler) most=900 ;; esac
  if [ "$(cat "$logs/$name.passed" 2>/dev/null)" = "$stamp" ]; then
    passed+=("$name")
    note "$name" "ok before" 0
    return
  fi
  if [ "$limit" -lt 20 ]; then
    left+=("$name")
    note "$name" "left" 0
    return
  fi
  if timeout --kill-after=20 $((limit < most ? limit : most)) "$@" >"$logs/$name.log" 2>&1; then
    passed+=("$name")
    printf '%s\n' "$stamp" >"$logs/$name.passed"
  else
    result="FAILED ($?)"
    failed+=("$name")
    tail -n 15 "$logs/$name.log"
  fi
  note "$name" "$result" $((SECONDS - started))
}

measure() { # NAME BENCH ARGUMENT...: a measurement, small in a rehearsal
  local name=$1 bench=$2
  shift 2
  step "$name" "${python[@]}" -m benchmarks "$bench" "$@" "${size[@]}" "${record[@]}"
}

gpus=1
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
  gpus=$("${python[@]}" -c 'import torch; print(torch.cuda.device_count())')
fi

pytest=(-m pytest -q -m "$marks" -p no:cacheprovider)
whole_job=tests/integration/test_cuda_job.py
# Not the whole suite, whose imports take longer than these tests.
mapfile -t marked < <(grep -rl --include='test_*.py' 'mark\.cuda' tests | grep -vx "$whole_job" | sort)
step kernels "${python[@]}" "${pytest[@]}" "${marked[@]}"                                 # 2.5 min
measure imagenet imagenet                                                                 # 5 min
measure job gpu-job                                                                       # 3.5 min
step whole-job "${python[@]}" "${pytest[@]}" "$whole_job"                                 # 3 min
measure kd-loss kd-loss-gpu                                                               # 2.5 min
if [ "$mode" = --rehearse ]; then
  measure pieces gpu-pieces # all parts in one process, to save time
  measure rivals gpu-rivals
else
  measure pieces gpu-pieces --part pieces                                                 # 2.5 min
  measure rivals-training gpu-rivals --part training                                      # 3 min
  measure rivals-sampler gpu-rivals --part sampler                                        # 5 min
  measure recipe gpu-rivals --part recipe                                                 # 2 min
  measure compile gpu-pieces --part compile                                               # 3 min
fi
step views "${python[@]}" -m benchmarks views --device cuda "${views[@]}" "${record[@]}"  # 0.5 min
measure ring ring                                                                         # 1 min
measure cuda-facts cuda-facts                                                             # 1 min
measure sampler sampler                                                                   # 2 min
if [ "$gpus" -gt 1 ]; then # A whole job over NCCL.
  rm -rf "$logs/two-gpus-run" # A run that failed before would be refused.
  step two-gpus "${python[@]}" -m torch.distributed.run --nproc-per-node=2 -m dmkd_fast \
    distill configs/fashion_mnist.yaml train.num_views=64000 "run_dir=$logs/two-gpus-run" # 1.5 min
fi
if [ "$mode" = --record ]; then
  step render "${python[@]}" -m benchmarks render
fi

"${python[0]}" -m benchmarks gpu-summary "$logs" || failed+=(gpu-summary)
echo "passed: ${passed[*]:-none}"
echo "failed: ${failed[*]:-none}"
if [ "${#left[@]}" -gt 0 ]; then
  echo "left for the next start: ${left[*]}"
fi
[ $((${#failed[@]} + ${#left[@]})) -eq 0 ]
