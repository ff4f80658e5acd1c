#!/bin/bash
# Several machines under Slurm, one launcher per node, 8 processes each: sbatch accelerate_configs/slurm.sh [train flags]
# If a process dies, all are restarted (--max_restarts); a job that is requeued resumes from its last complete
# checkpoint, or starts from step 0 if it has none yet. Before its time limit a job saves, stops and requeues itself, as
# long as it makes progress; a job that fails, or that the guard stops (docs/reliability.md), does not. The working
# directory and the checkpoint folder are on a file system that all nodes share.
#SBATCH --job-name=gpt2flash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

checkpoint_path=${CHECKPOINT_PATH:-checkpoint}
processes_per_node=${SLURM_GPUS_ON_NODE:-8}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_node=${nodes%%$'\n'*}
main_port=$((20000 + SLURM_JOB_ID % 10000)) # another for each job, in case jobs share a node

run=$checkpoint_path/optimized
latest() { cat "$run/latest" 2> /dev/null || true; }
before=$(latest)
status=0

# Slurm sends SIGUSR1 to all processes of the step 120 seconds before its end. The launcher ignores it, and so does not
# cut short what its processes do about it. A signal that comes while they start is lost: SLURM_JOB_END_TIME is not.
# SLURM_NODEID is known on the node only: the inner shell expands it.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file accelerate_configs/deepspeed_machines.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * processes_per_node)) \
    --main_process_ip "$main_node" --main_process_port "$main_port" \
    --max_restarts 3 \
    -m train --run_type optimized --deepspeed_config ds_configs/zero2.json \
    --checkpoint_path "$checkpoint_path" --save_interval 1000 --resume_from_checkpoint "$@" || status=$?

# Under a launcher that restarts what fails, a run that has stopped early with everything saved ends with 0.
if [ "$status" = 0 ] && [ ! -e "$run/metrics.json" ] && [ "$(latest)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
