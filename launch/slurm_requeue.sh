#!/bin/bash
# A training job that is asked to save two minutes before its time is over, and queued again until the training is done:
#   EXP=exp/whisper_qwen2 sbatch launch/slurm_requeue.sh data.train_data_config=train.yaml model.llm.pretrained_model=/path/to/llm ...
#SBATCH --job-name=asrllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120   # to every rank: at most the step under way, one more and the saving must fit into these seconds
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

: "${EXP:?give the directory that the run writes to: EXP=exp/NAME sbatch launch/slurm_requeue.sh ...}"
# srun starts the ranks itself: torchrun's agent and deepspeed's launcher would die of SIGUSR1 rather than pass it on
srun --kill-on-bad-exit=1 python launch/train.py "exp_dir=$EXP" "$@"
status=$?

# 0: the run is done, or it saved and stopped early. 75: a rank hung (hang-rank*.txt says where) or was
# killed. Any other failure would happen again.
# pretrained.pt is written when the training is over, config.yaml whenever it begins or goes on.
if { [ "$status" -eq 0 ] && [ ! "$EXP/pretrained.pt" -nt "$EXP/config.yaml" ]; } || [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
