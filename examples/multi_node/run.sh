#!/usr/bin/env bash
# Train on several nodes, with one of three launchers. See README.md.
#   LAUNCHER=deepspeed ./run.sh [key=value ...]                          once
#   LAUNCHER=torchrun NODES=2 RANK0=node1 NODE=0 ./run.sh [key=value ...]  on each node
#   LAUNCHER=slurm ./run.sh [key=value ...]                              once
set -euo pipefail
cd "$(dirname "$0")"
EXP=${EXP:-$PWD/exp/multi_node} # a directory that all nodes share
RUN=(--config-dir "$PWD" --config-name train "exp_dir=$EXP" "$@")

case ${LAUNCHER:-deepspeed} in
deepspeed)
  deepspeed --hostfile hostfile --module asrllm train "${RUN[@]}"
  ;;
torchrun)
  torchrun --nnodes="${NODES:-2}" --node_rank="$NODE" --nproc_per_node="${GPUS:-8}" \
    --master_addr="$RANK0" -m asrllm train "${RUN[@]}"
  ;;
slurm)
  sbatch slurm.sh "${RUN[@]}"
  ;;
*)
  echo "LAUNCHER=$LAUNCHER is unknown. Use deepspeed, torchrun or slurm." >&2
  exit 2
  ;;
esac
