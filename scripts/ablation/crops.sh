#!/usr/bin/env bash
# Ablation, one budget per crop or per image, on LLaVA-NeXT: bash scripts/ablation/crops.sh [--tokens 64,32]; see scripts/_ablation.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_ablation.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/ablation/crops.sh" >&2; exit 2; }
vispruner_ablation crops llava-v1.6-vicuna-7b "$@"
