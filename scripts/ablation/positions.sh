#!/usr/bin/env bash
# Ablation, contiguous or original position ids of kept tokens: bash scripts/ablation/positions.sh [--tokens 64,32]; see scripts/_ablation.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_ablation.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/ablation/positions.sh" >&2; exit 2; }
vispruner_ablation positions llava-v1.5-7b "$@"
