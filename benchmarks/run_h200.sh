#!/usr/bin/env bash
# Runs parts of the benchmark and leaves results, logs and a report in OUT. From anywhere:
#
#     benchmarks/run_h200.sh OUT PART...        BUDGET=seconds in all (default 540)
#
# smoke     every chain, arm, mode and kind of shapes at two sizes, few rounds: does it all run?
# default   all sizes, Inductor's default mode and what it competes with
# static    all sizes, all modes
# dynamic   symbolic rows, and symbolic rows and width
# host      host time per call, import and compile time
set -uo pipefail

out="$(mkdir -p "${1:?usage: run_h200.sh OUT PART...}" && cd "$1" && pwd)"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
budget="${BUDGET:-540}"
device="${DEVICE:-cuda}"
export PYTHONUNBUFFERED=1

core() {
    "$python" -m benchmarks.core --out "$out" --device "$device" \
        --time-budget "$((budget - SECONDS))" "$@"
}
host() { "$python" -m benchmarks.host --out "$out" --device "$device" "$@"; }

status=0
for part in "$@"; do
    echo "=== $part ($SECONDS s)"
    case "$part" in
        smoke) core --quick --shapes static,dynamic-rows,dynamic; core=$?; host --quick && exit "$core" ;;
        default) core --modes default ;;
        static) core ;;
        dynamic) core --shapes dynamic-rows,dynamic ;;
        host) host ;;
        *) echo "unknown part: $part" >&2; exit 2 ;;
    esac 2>&1 | tee "$out/$part.log" | grep --line-buffered -v -E 'Warning|warnings.warn'
    [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
done

echo "=== report ($SECONDS s)"
"$python" -m benchmarks.report "$out"/*.json --check --partial >"$out/report.md" || status=1
grep -E '^(MISS|All marks)' "$out/report.md"
exit "$status"
