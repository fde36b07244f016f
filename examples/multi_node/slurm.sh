#!/usr/bin/env bash
# run.sh submits this. launch/slurm_requeue.sh also resumes the job after its time limit.
#SBATCH --job-name=asrllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail

srun --kill-on-bad-exit=1 python -m asrllm train "$@"
