#!/usr/bin/env bash
# Shared by the scripts for the paper's figures about attention.
#
#   source scripts/_figures.sh; vispruner_figure fig2 "$@"
#   "$@": flags of python -m llava.analysis.figures, e.g. --num-questions 200 --limit 100
#
# Writes PNG, SVG and the data as CSV to outputs/figures/FIGURE. Rerunning the command resumes an interrupted run. The
# last line of output is one JSON document.
#
# Environment variables:
#   CKPT_DIR, CKPT   as for the evaluation scripts: folder of checkpoints and the name of one of them (default:
#                    llava-v1.5-7b); CKPT without CKPT_DIR is a path
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval
#   OUT_DIR          folder for answers and figures (default: outputs/ in the repository); figures are in its folder
#                    figures/
# Without checkpoint and data, the bundled ones are used, and the first line of output says so.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_eval.sh"

vispruner_figure() { # fig2 or fig3, arguments
    local figure=$1 output flags=()
    shift
    _vp_checkpoint llava-v1.5-7b
    output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$(_vp_path "$DATA_DIR")"); fi
    if [ -n "$MODEL_" ]; then
        # As the published numbers were measured; the bundled models keep exact pixels.
        if ! [ "$MODEL_" -ef "$ROOT/playground/tiny/llava-tiny" ] \
            && ! [ "$MODEL_" -ef "$ROOT/playground/tiny/llava-tiny-anyres" ]; then
            export VISPRUNER_PRESET=${VISPRUNER_PRESET:-published}
        fi
        flags+=(--model "$MODEL_")
        vispruner_env plot
    else
        vispruner_env plot tiny
        vispruner_tower
    fi
    _vp_folder "$output" OUT_DIR
    exec "$PY" "$ROOT/scripts/_launch.py" llava.analysis.figures "$figure" ${flags[@]+"${flags[@]}"} \
        --output "$output/figures" "$@"
}
