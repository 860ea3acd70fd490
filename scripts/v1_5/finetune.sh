#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: train projector and language model on instructions, from the projector of stage 1.
#   [VARIABLE=value ...] bash scripts/v1_5/finetune.sh [options of llava/train/train.py, which take precedence]
# The variables and their defaults are in scripts/_train.sh; with nothing set, the script names the files it needs.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_train.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/v1_5/finetune.sh" >&2; exit 2; }
RECIPE=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-5 --save_steps 50000)
vispruner_train finetune 128 16 zero3 ${1+"$@"}
