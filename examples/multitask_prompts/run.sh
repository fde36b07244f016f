#!/usr/bin/env bash
# Train transcription and translation, in two languages. See README.md.
#   [TRANSLATIONS=MANIFEST] [GPUS=8] ./run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
EXP=${EXP:-exp/multitask}

if [ ! -e shards/translate ]; then
  asrllm shards make shards/translate --nemo "${TRANSLATIONS:-data/translate.jsonl}"
fi
torchrun --nproc_per_node="${GPUS:-8}" -m asrllm train \
  --config-dir . --config-name train exp_dir="$EXP" "$@"
asrllm export "$EXP" --output "$EXP/model"
