#!/usr/bin/env bash
# Measures everything on one GPU, in phases that each end within BUDGET seconds (default 530), the
# most telling cases first. From anywhere; nothing else may use the machine:
#
#     benchmarks/run_h200.sh OUT PHASE...
#
#     1  workloads, main grid: every provider and mode, both widths
#     2  workloads, the other grids: symbolic sizes, variants, widths, dtypes
#     3  host and compile time
#     4  the kernel: its launch rule, and beside SGLang's if sglang can be found (its sources are
#        enough)
#     5  transformers' modules: Qwen2-MoE's
#     6  and Qwen3-Next's
#     7  workloads, the grid of training
#
# The times that a phase prints are estimates for an H200 with 16 cores; BUDGET holds. A process that
# is in a case when the time is over is given 15 s.
# Result files in OUT are written after each case: a phase that is cut off leaves what it
# measured. PYTHON and DEVICE choose the interpreter and the device; QUICK=1 runs toy sizes:
#
#     QUICK=1 DEVICE=cpu benchmarks/run_h200.sh OUT 1 2 3 5 6     # 4 needs TRITON_INTERPRET=1 as well
set -uo pipefail

out="$(mkdir -p "${1:?usage: run_h200.sh OUT PHASE...}" && cd "$1" && pwd)"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1
device="${DEVICE:-cuda}"
status=0

# measure SHARE ARGUMENTS...: a suite, with SHARE percent of what is left of the phase's time.
measure() {
    local left=$(((${BUDGET:-530} - (SECONDS - begun)) * $1 / 100))
    shift
    echo "=== $* ($SECONDS s; $left s at most)"
    "${PYTHON:-python3}" -m benchmarks "$@" --out "$out" --device "$device" \
        --time-budget "$left" ${QUICK:+--quick} 2> >(tee -a "$out/run.log" >&2)
    local code=$?
    [ "$code" -eq 0 ] || { echo "=== $1 ended with $code"; status=1; }
}

for phase in "$@"; do
    begun=$SECONDS
    case "$phase" in
        1)
            echo "=== phase 1, about 420 s"
            measure 100 workloads --grid main
            ;;
        2)
            echo "=== phase 2, about 300 s"
            measure 100 workloads --grid dynamic,variants,widths,dtypes
            ;;
        3)
            echo "=== phase 3, about 200 s"
            measure 100 host
            ;;
        4)
            echo "=== phase 4, about 150 s"
            measure 50 launch-config --dtypes bfloat16
            if "${PYTHON:-python3}" -c 'from benchmarks import run_sglang; run_sglang.load()' 2>/dev/null; then
                measure 100 sglang
            fi
            ;;
        5)
            echo "=== phase 5, about 400 s"
            measure 100 modules --models qwen2_moe
            ;;
        6)
            echo "=== phase 6, about 400 s"
            measure 100 modules --models qwen3_next
            ;;
        7)
            echo "=== phase 7, about 300 s"
            # Few at a time: the largest case takes 32 GB of the device.
            measure 100 workloads --grid training --processes 4
            ;;
        *)
            echo "unknown phase: $phase" >&2
            exit 2
            ;;
    esac
done

echo "=== thresholds (${SECONDS} s)"
"${PYTHON:-python3}" -m benchmarks check "$out"/*.json --partial | tee "$out/violations.txt" || status=1
exit "$status"
