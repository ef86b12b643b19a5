#!/bin/bash
#SBATCH --job-name=llava-compodistill --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00
#SBATCH --signal=USR1@300 --requeue --open-mode=append
# A training script as a Slurm job, on one machine or several: sbatch --nodes=2 scripts/slurm.sh scripts/dft.sh [FLAGS]
# Submit it from the folder that the paths in the settings are meant for. Settings are environment variables, as ever.
#
# Five minutes before the time is over (or the job is preempted) the run saves a checkpoint and ends with status 75; the
# job is then queued again and goes on from there. Give it longer (--signal=USR1@600) if a step and a checkpoint take
# more. MAX_REQUEUES says how often at most: 100.
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || {
    echo "slurm.sh: this is a job script: sbatch [OPTIONS] scripts/slurm.sh scripts/dft.sh [FLAGS]" >&2
    exit 2
}
[[ $# -gt 0 && -f $1 ]] || {
    echo "slurm.sh: ${1:-no script given}: name a training script, such as scripts/dft.sh, as seen from $PWD." >&2
    exit 2
}

export NNODES=${SLURM_JOB_NUM_NODES:-1}
if ((NNODES > 1)); then
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${MASTER_ADDR:-${nodes%%$'\n'*}}
    # Two jobs that share a machine do not meet.
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export RDZV_ID=$SLURM_JOB_ID
fi

status=0
# The machines of a stopped run end with 75 one after the other: none is killed for another's status.
# shellcheck disable=SC2016 # SLURM_NODEID has a value of its own on each machine
srun --kill-on-bad-exit=0 --ntasks="$NNODES" --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' slurm.sh "$@" || status=$?
if [[ $status == 75 ]] && ((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-100})); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
