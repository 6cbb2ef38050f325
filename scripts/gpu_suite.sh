#!/usr/bin/env bash
# All that needs a GPU, in one call of at most nine minutes: tests, benchmarks, tuned tiles, joules.
#   bash scripts/gpu_suite.sh --dry-run        # what it would run
#   bash scripts/gpu_suite.sh [--out FOLDER]   # default: benchmarks/results
# It writes one FOLDER/<date>-<gpu>.json, whatever fails. Nothing is installed and the network is not used: it
# needs torch with CUDA, triton and numpy; without pytest the tests are skipped, and the JSON says so.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_suite "$@"
