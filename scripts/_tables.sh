#!/usr/bin/env bash
# What the scripts of tables share: what lies under outputs/ set beside the paper's numbers, nothing is run.
#
#   source scripts/_tables.sh; vispruner_table llava-1.5-7b "$@"
#   "$@": flags of python -m llava.eval.tables
#
# Environment variables:
#   OUT_DIR          where the evaluation scripts left answers and scores, default outputs/ in the repository;
#                    Markdown, CSV, LaTeX and HTML go to its folder tables/
#   CKPT_DIR, CKPT   as for the evaluation scripts: the checkpoint whose results to show, where its name is not
#                    the published one's; for a table of several models give --model MODEL=NAME instead

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

vispruner_table() {
    local table=$1 results=${OUT_DIR:-$ROOT/outputs} model=${CKPT:-}
    shift
    if [ -z "$model" ] && [ -n "${CKPT_DIR:-}" ] && [ -f "$CKPT_DIR/config.json" ]; then model=$CKPT_DIR; fi
    [ "$table" != other-vlms ] || model=""
    vispruner_env
    mkdir -p "$results"
    exec "$PY" -m llava.eval.tables --table "$table" --results "$results" --output "$results/tables" \
        ${model:+--model "$model"} "$@"
}
