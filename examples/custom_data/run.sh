#!/usr/bin/env bash
# From folders of audio and text to an exported model. See README.md.
#   [STAGES="plan train"] [DATA=DIR] [LANGUAGE=en] [EXP=DIR] [GPUS=1] ./run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
STAGES=${STAGES:-prepare plan train evaluate export}
DATA=${DATA:-data} # has the folders train and test
EXP=${EXP:-exp/custom}
GPUS=${GPUS:-1}
RUN=(--config-dir . --config-name train "exp_dir=$EXP" "$@")

stage() { [[ " $STAGES " == *" $1 "* ]]; }

if stage prepare; then
  for part in train test; do
    [ ! -e "shards/$part" ] || continue
    asrllm shards make "shards/$part" --folder "$DATA/$part" --lang "${LANGUAGE:-en}"
  done
fi

if stage plan; then
  asrllm plan "${RUN[@]}" gpus="$GPUS"
fi

if stage train; then
  torchrun --nproc_per_node="$GPUS" -m asrllm train "${RUN[@]}"
fi

if stage evaluate; then
  torchrun --nproc_per_node="$GPUS" -m asrllm evaluate exp_dir="$EXP" \
    data.test_data_config=valid_data.yaml
fi

if stage export; then
  asrllm export "$EXP" --output "$EXP/model"
fi
