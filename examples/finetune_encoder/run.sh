#!/usr/bin/env bash
# Continue a run with a trained encoder. See README.md.
#   [INIT=EXP] [GPUS=8] ./run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"

torchrun --nproc_per_node="${GPUS:-8}" -m asrllm train --config-dir . --config-name train \
  exp_dir=exp/finetuned init_from="${INIT:-../librispeech/exp/whisper_qwen2}" "$@"
