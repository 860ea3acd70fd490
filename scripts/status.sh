#!/usr/bin/env bash
# Show the state of every run below OUT_DIR (default: outputs/ in the repository) or FOLDER:
#
#   bash scripts/status.sh [FOLDER] [flags of python -m llava.eval.status, e.g. --json]

. "$(dirname -- "$0")/_env.sh"
vispruner_env
case "${1:--}" in -*) set -- "$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")" ${1+"$@"} ;; esac
exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.status "$@"
