#!/usr/bin/env bash
# Shared by the scripts for the paper's figures.
#
#   source scripts/_figures.sh; vispruner_figure fig2 "$@"
#   "$@": flags of python -m llava.analysis.figures FIGURE, e.g. --limit 100; --help lists them
#
# Writes PNG, SVG and the data as CSV to outputs/figures/FIGURE. Rerunning the command resumes an interrupted run. The
# last line of output is one JSON document.
#
# Environment variables:
#   CKPT_DIR, CKPT   as for the evaluation scripts: folder of checkpoints and the name of one of them (default:
#                    llava-v1.5-7b); CKPT without CKPT_DIR is a path
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval
#   OUT_DIR          folder for answers and figures (default: outputs/ in the repository); figures are in its folder
#                    figures/, answers of fig5 in ablation/, as those of scripts/ablation/components.sh
# Without checkpoint and data, the bundled ones are used, and the first line of output says so.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_eval.sh"

vispruner_figure() { # fig1 ... fig5, arguments
    local figure=$1 output flags=()
    shift
    _vp_checkpoint llava-v1.5-7b
    output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$(_vp_path "$DATA_DIR")"); fi
    if [ "$figure" = fig5 ]; then flags+=(--ablation "$output/ablation"); fi
    if [ -n "$MODEL_" ]; then
        _vp_published
        flags+=(--model "$MODEL_")
    fi
    _vp_model_env plot ${1+"$@"}
    _vp_folder "$output" OUT_DIR
    exec "$PY" "$ROOT/scripts/_launch.py" llava.analysis.figures "$figure" ${flags[@]+"${flags[@]}"} \
        --output "$output/figures" "$@"
}
