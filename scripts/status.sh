#!/usr/bin/env bash
# Show the state of every run below OUT_DIR (default: outputs/ in the repository) or FOLDER:
#
#   bash scripts/status.sh [FOLDER] [flags of python -m llava.eval.status, e.g. --json]

here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/status.sh" >&2; exit 2; }
vispruner_env
case "${1:--}" in -*) set -- "$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")" ${1+"$@"} ;; esac
exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.status "$@"
