#!/usr/bin/env bash
# Shared by the scripts for ablations: one choice of VisPruner changes, and the scores are compared.
#
#   source scripts/_ablation.sh; vispruner_ablation ratio llava-v1.5-7b "$@"
#   "$@": flags of python -m llava.analysis.ablation, e.g. --tokens 64 --benchmarks pope,gqa --limit 900
#
# Tables, CSV, plots and a page are written to OUT_DIR/ablation/NAME, answers to OUT_DIR/ablation/answers. Rerunning the
# command resumes an interrupted run; after a finished run it only computes the tables again. The last line of output is
# one JSON document.
#
# Environment variables: CKPT_DIR, CKPT, DATA_DIR, OUT_DIR and VISPRUNER_PRESET as for the evaluation scripts, see
# scripts/_eval.sh. Without checkpoint and data, the bundled ones are used, and the first line of output says so.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_eval.sh"

vispruner_ablation() { # name, default checkpoint, arguments
    local name=$1 flags=() output
    _vp_checkpoint "$2"
    shift 2
    output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$(_vp_path "$DATA_DIR")"); fi
    if [ -n "$MODEL_" ]; then
        flags+=(--model "$MODEL_")
        # The tower's dtype is part of the preset, and what dtype.sh changes.
        [ "$name" = dtype ] || _vp_published
    fi
    _vp_model_env plot ${1+"$@"}
    _vp_folder "$output" OUT_DIR
    exec "$PY" "$ROOT/scripts/_launch.py" llava.analysis.ablation "$name" ${flags[@]+"${flags[@]}"} \
        --output "$output/ablation" "$@"
}
