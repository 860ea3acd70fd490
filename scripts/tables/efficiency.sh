#!/usr/bin/env bash
# Compare measurements with the efficiency table: bash scripts/tables/efficiency.sh [--measured DIR]; runs no model
source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
vispruner_env
"$PY" -m llava.analysis.efficiency table --measured "${OUT_DIR:-$ROOT/outputs}/efficiency" "$@"
