#!/usr/bin/env bash
# Prepare LibriSpeech, train, evaluate and export. See README.md.
#   [STAGES="plan train"] [GPUS=8] [CORPUS=DIR] [EXP=DIR] ./run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
STAGES=${STAGES:-prepare plan train evaluate export}
GPUS=${GPUS:-8}
EXP=${EXP:-exp/whisper_qwen2}
AVERAGED=${AVERAGED:-3} # checkpoints
RUN=(--config-dir . --config-name train "exp_dir=$EXP" "$@")

stage() { [[ " $STAGES " == *" $1 "* ]]; }
last_step() { sed -n 's/^  num_steps: //p' "$EXP/config.yaml"; }

if stage prepare; then
  if [ -z "${CORPUS:-}" ]; then # the directory LibriSpeech, if you have it
    lhotse download librispeech data
    CORPUS=data/LibriSpeech
  fi
  lhotse prepare librispeech --normalize-text lower -j 8 "$CORPUS" data/manifests
  for part in train-clean-100 train-clean-360 train-other-500 {dev,test}-{clean,other}; do
    [ ! -e "shards/$part" ] || continue
    cuts=data/manifests/librispeech_cuts_$part.jsonl.gz
    lhotse cut simple --force-eager \
      -r "data/manifests/librispeech_recordings_$part.jsonl.gz" \
      -s "data/manifests/librispeech_supervisions_$part.jsonl.gz" "$cuts"
    asrllm shards make "shards/$part" --cuts "$cuts" --lang en
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
    checkpoint.model.iter="$(last_step)" checkpoint.model.avg="$AVERAGED" \
    data.test_data_config=test_data.yaml
fi

if stage export; then
  asrllm export "$EXP" --output "$EXP/model" \
    --weights "$EXP/averaged-iter-$(last_step)-avg-$AVERAGED.pt"
fi
