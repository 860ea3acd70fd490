#!/usr/bin/env bash
# Ablation, what importance is: [CLS] attention, received attention, feature norm, random: bash scripts/ablation/cue.sh [--tokens 64,32]; see scripts/_ablation.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_ablation.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/ablation/cue.sh" >&2; exit 2; }
vispruner_ablation cue llava-v1.5-7b "$@"
