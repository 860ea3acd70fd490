#!/usr/bin/env bash
# Ablation, tower layer of the importance cue: bash scripts/ablation/cue_layer.sh [--tokens 64,32]; see scripts/_ablation.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_ablation.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/ablation/cue_layer.sh" >&2; exit 2; }
vispruner_ablation cue_layer llava-v1.5-7b "$@"
