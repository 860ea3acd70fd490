#!/usr/bin/env bash
# Everything that the paper reports in one report, outputs/paper/index.html: all tables, ablations and figures.
#
#   bash scripts/paper.sh [--quick] [--list] [flags of python -m llava.eval.paper]
#   CKPT_DIR=checkpoints DATA_DIR=playground/data/eval bash scripts/paper.sh      # ends in a verdict on published numbers
#
# --list prints what would run, what is missing, how long it takes and how much disk. Rerunning the command resumes an
# interrupted run and skips what did not change. The last line of output is one JSON document.
#
# Environment variables:
#   CKPT_DIR, DATA_DIR   folders of the published checkpoints and of the benchmarks (default: the bundled ones)
#   OUT_DIR              the report is written to its folder paper/ (default: outputs/ in the repository)

here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/paper.sh" >&2; exit 2; }
vispruner_env plot tiny
[ -n "${CKPT_DIR:-}" ] || vispruner_tower
output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
_vp_folder "$output" OUT_DIR
case " $* " in *" --quick "*) output=$output/paper-quick ;; *) output=$output/paper ;; esac
exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.paper --output "$output" "$@"
