#!/usr/bin/env bash
# Ablation, tokens dropped per round: bash scripts/ablation/drop.sh [--tokens 64,32]; see scripts/_ablation.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_ablation.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/ablation/drop.sh" >&2; exit 2; }
vispruner_ablation drop llava-v1.5-7b "$@"
