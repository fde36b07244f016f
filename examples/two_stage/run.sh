#!/usr/bin/env bash
# Train the projector, then the projector and adapters of the LLM. See README.md.
#   [GPUS=8] ./run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
TRAIN=(torchrun --nproc_per_node="${GPUS:-8}" -m asrllm train --config-dir . --config-name train)

"${TRAIN[@]}" exp_dir=exp/projector model.llm.lora.r=0 trainer.lr=1e-3 "$@"
"${TRAIN[@]}" exp_dir=exp/lora init_from=exp/projector \
  model.llm.lora.r=64 model.llm.lora.lora_alpha=128 model.llm.lora.target_modules=all-linear \
  trainer.lr=1e-4 "$@"
