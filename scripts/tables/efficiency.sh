#!/usr/bin/env bash
# Compare measurements with the efficiency table: bash scripts/tables/efficiency.sh [--measured DIR ...]; runs no model
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/efficiency.sh" >&2; exit 2; }
vispruner_env
outputs=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
vispruner_python llava.analysis.efficiency table --measured "$outputs/efficiency" "$outputs/gpu" "$@"
