#!/usr/bin/env bash
# Shared by the scripts for the paper's tables: compares the scores under outputs/ with the published ones.
# No model is run.
#
#   source scripts/_tables.sh; vispruner_table llava-1.5-7b "$@"
#   "$@": flags of python -m llava.eval.tables
#
# Environment variables:
#   OUT_DIR          folder where the evaluation scripts wrote answers and scores (default: outputs/ in the
#                    repository); Markdown, CSV, LaTeX and HTML are written to its folder tables/
#   CKPT_DIR, CKPT   as for the evaluation scripts: the checkpoint whose results to show, if its name differs from
#                    the published one; for a table of several models pass --model MODEL=NAME instead

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

vispruner_table() {
    local table=$1 results model=${CKPT:-}
    results=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
    shift
    if [ -z "$model" ] && [ -n "${CKPT_DIR:-}" ] && [ -f "$CKPT_DIR/config.json" ]; then model=$CKPT_DIR; fi
    case $table in other-vlms | fastervlm) model="" ;; esac # tables of several models
    vispruner_env plot
    _vp_folder "$results" OUT_DIR
    exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.tables --table "$table" --results "$results" --output "$results/tables" \
        ${model:+--model "$model"} "$@"
}
