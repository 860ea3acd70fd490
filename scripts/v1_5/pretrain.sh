#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5: train the projector on captions; tower and language model are frozen.
#   [VARIABLE=value ...] bash scripts/v1_5/pretrain.sh [options of llava/train/train.py, which take precedence]
# The variables and their defaults are in scripts/_train.sh; with nothing set, the script names the files it needs.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_train.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/v1_5/pretrain.sh" >&2; exit 2; }
RECIPE=(--version plain --tune_mm_mlp_adapter True --learning_rate 1e-3 --save_steps 24000)
vispruner_train pretrain 256 32 zero2 ${1+"$@"}
