#!/usr/bin/env bash
# Train with each combination of values, one run after the other. See README.md.
#   ./run.sh [key=value1,value2,... ...]
set -euo pipefail
cd "$(dirname "$0")"

if [ "$#" -eq 0 ]; then
  set -- trainer.lr=1e-4,3e-4 model.llm.lora.r=16,64
fi
asrllm train --multirun --config-dir . --config-name train hydra.sweep.dir=exp/sweep "$@"
