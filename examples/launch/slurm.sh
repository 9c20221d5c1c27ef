#!/bin/bash
# One job over several nodes of a Slurm cluster, from the project's folder:
#
#   sbatch --nodes 4 examples/launch/slurm.sh pipeline --config examples/setups/qwen2.5-7b_ultrafeedback.yaml
#
# Before the time limit the processes are told to end (TERM); they save, and the job goes back into the queue and on from there.
#SBATCH --job-name=aligndistil
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "$SLURM_SUBMIT_DIR" || exit 1
# shellcheck disable=SC1091  # made by `make setup`
source .venv/bin/activate

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD_NODE NUM_NODES="$SLURM_JOB_NUM_NODES" PROCESSES="${SLURM_GPUS_ON_NODE:-gpu}"

# One torchrun a node; srun ends the others when one of them has failed.
# shellcheck disable=SC2016  # SLURM_NODEID is known on the nodes
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec examples/launch/torchrun.sh "$@"' launch "$@"
code=$?

# A job whose time is up has saved and is to go on; one that failed earlier would only fail again. Slurm may send its signal up to
# a minute early.
left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
if ((code != 0 && left < 240)); then
    echo "the time limit is near: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
