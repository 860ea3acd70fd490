#!/usr/bin/env bash
# The table of efficiency: bash scripts/tables/efficiency.sh; see scripts/_tables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_tables.sh"
vispruner_table efficiency "$@"
