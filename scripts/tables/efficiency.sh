#!/usr/bin/env bash
# Efficiency table, measured and published; runs no model: bash scripts/tables/efficiency.sh [--measured DIR]
source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
vispruner_env
"$PY" -m llava.analysis.efficiency table --measured "${OUT_DIR:-$ROOT/outputs}/efficiency" "$@"
