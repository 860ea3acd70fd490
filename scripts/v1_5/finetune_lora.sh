#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with LoRA on the language model; the projector is trained in full.
#   [VARIABLE=value ...] bash scripts/v1_5/finetune_lora.sh [options of llava/train/train.py, which take precedence]
# The variables and their defaults are in scripts/_train.sh; with nothing set, the script names the files it needs.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_train.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/v1_5/finetune_lora.sh" >&2; exit 2; }
RECIPE=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4 --save_steps 50000)
vispruner_train finetune_lora 128 16 zero3 ${1+"$@"}
