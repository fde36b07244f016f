#!/usr/bin/env bash
# Train on the GPUs of this machine:
#   scripts/train.sh exp_dir=exp/whisper_qwen2 [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${GPUS:-8}" train.py "$@"
