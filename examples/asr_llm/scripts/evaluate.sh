#!/usr/bin/env bash
# Average the last checkpoints of a run, and decode the test sets on the GPUs of this machine:
#   scripts/evaluate.sh exp_dir=exp/whisper_qwen2 [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${GPUS:-8}" evaluate.py \
  checkpoint.model.iter=100000 checkpoint.model.avg=5 \
  data.test_data_config=configs/test_data_config.yaml \
  "$@"
