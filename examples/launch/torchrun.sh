#!/usr/bin/env bash
# One job over several machines: start it on every one of them, in the project's folder, each with its own NODE_RANK.
#
#   HEAD_NODE=node0 NUM_NODES=4 NODE_RANK=0 examples/launch/torchrun.sh \
#       pipeline --config examples/setups/qwen2.5-7b_ultrafeedback.yaml
#
# HEAD_NODE   the machine with NODE_RANK 0, by a name or address that all the others reach
# NUM_NODES   how many machines
# NODE_RANK   which one this is, from 0
# PROCESSES   processes on each machine (default: one a GPU)
# PORT        a port that is free on HEAD_NODE (default: 29500)
set -euo pipefail
: "${HEAD_NODE:?set it to the name of the machine with NODE_RANK 0}"
: "${NUM_NODES:?set it to the number of machines}"
: "${NODE_RANK:?set it to the number of this machine, from 0}"

# Once told to end, the processes save; torchrun ends them by force after so many seconds (its own default: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"

# Without --rdzv-backend c10d, under which a torchrun whose network has gone was still waiting minutes later.
# No restarts by torchrun either: a run goes on from its checkpoint when the same command is given again.
exec torchrun --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PROCESSES:-gpu}" \
    --master-addr "$HEAD_NODE" --master-port "${PORT:-29500}" --max-restarts 0 \
    -m megatron_aligndistil "$@"
