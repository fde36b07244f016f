#!/usr/bin/env bash
# Write data/aishell2/cuts_{train,dev,test}.jsonl.gz:
#   scripts/prepare_aishell2.sh DIR     (DIR contains AISHELL-2/iOS)
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?give the directory that contains AISHELL-2/iOS}
manifests=data/aishell2

lhotse prepare aishell2 -j "${JOBS:-8}" "$corpus" "$manifests"
for part in train dev test; do
  lhotse cut simple --force-eager \
    -r "$manifests/aishell2_recordings_$part.jsonl.gz" \
    -s "$manifests/aishell2_supervisions_$part.jsonl.gz" \
    "$manifests/cuts_$part.jsonl.gz"
done
