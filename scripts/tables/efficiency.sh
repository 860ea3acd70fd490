#!/usr/bin/env bash
# Compare measurements with the efficiency table: bash scripts/tables/efficiency.sh [--measured DIR]; runs no model
. "$(dirname -- "$0")/../_env.sh"
vispruner_env
vispruner_python llava.analysis.efficiency table --measured "$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")/efficiency" "$@"
