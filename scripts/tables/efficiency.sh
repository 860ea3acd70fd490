#!/usr/bin/env bash
# The table of efficiency, measured beside published: bash scripts/tables/efficiency.sh [--measured DIR]; runs nothing
source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
vispruner_env
"$PY" -m llava.analysis.efficiency table --measured "${OUT_DIR:-$ROOT/outputs}/efficiency" "$@"
