#!/usr/bin/env bash
# Starts this node's ranks of a multi-node run. Call it once on every node, from a checkout or with `moe` installed:
#   HEAD=node0 NNODES=4 GPUS=8 scripts/torchrun_node.sh train CONFIG --run-dir /shared/run parallel.ep=8
# HEAD is any one of the nodes; The run folder and data.cache_dir must be on storage that all nodes see.
set -euo pipefail
: "${HEAD:?set HEAD to the host name of one of the nodes}"
: "${NNODES:?set NNODES to the number of nodes}"
GPUS="${GPUS:-8}"
PORT="${PORT:-29500}"
# Megatron overlaps tensor-parallel communication only if kernels are issued in order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${RUN_ID:-joulemoe}" \
  -m moe "$@"
