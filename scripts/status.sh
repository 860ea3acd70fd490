#!/usr/bin/env bash
# Show the state of every run below OUT_DIR (default: outputs/ in the repository) or FOLDER:
#
#   bash scripts/status.sh [FOLDER] [flags of python -m llava.eval.status, e.g. --json]

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
vispruner_env
case "${1:--}" in -*) set -- "${OUT_DIR:-$ROOT/outputs}" ${1+"$@"} ;; esac
exec "$PY" -m llava.eval.status "$@"
