#!/bin/bash
# A training job that saves two minutes before its time limit, and is requeued until it is complete:
#   EXP=exp/whisper_qwen2 sbatch launch/slurm_requeue.sh data.train_data_config=train.yaml \
#       model.llm.pretrained_model=/path/to/llm ...
#SBATCH --job-name=asrllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# every rank gets the signal; the current step, one more and the saving must fit into 120 s
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

: "${EXP:?set the directory of the run: EXP=exp/NAME sbatch launch/slurm_requeue.sh ...}"
# srun starts the ranks itself, because SIGUSR1 kills torchrun's agent and deepspeed's launcher,
# which do not forward it
srun --kill-on-bad-exit=1 python launch/train.py "exp_dir=$EXP" "$@"
status=$?

# Status 0: the run is complete, or it saved and stopped early. Status 75: a rank hung (see
# hang-rank*.txt) or was killed. Any other failure would happen again.
# pretrained.pt is written at the end of training, config.yaml when it starts or resumes.
stopped_early() {
    [ "$status" -eq 0 ] && [ ! "$EXP/pretrained.pt" -nt "$EXP/config.yaml" ]
}
if stopped_early || [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
