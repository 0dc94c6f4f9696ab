#!/usr/bin/env bash
# Measures 7B shapes on the GPU of this machine in at most 8 minutes (scripts/bench/gpu.py says what and with which
# packages); without a GPU, narrow models on the CPU. Figures go to $OUT/gpu.jsonl, by default build/gpu.jsonl, as they
# are reached; call it again to go on. Further words are options of gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-build}/gpu.jsonl
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
timeout "${SECONDS_AT_MOST:-470}" "$python" scripts/bench/gpu.py --out "$out" "$@" || {
    status=$?
    [ "$status" = 124 ] || exit "$status"
    "$python" scripts/bench/gpu.py --out "$out" --table
}
