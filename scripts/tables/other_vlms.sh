#!/usr/bin/env bash
# Compare measured scores with the table of other models: bash scripts/tables/other_vlms.sh; see scripts/_tables.sh
. "$(dirname -- "$0")/../_tables.sh"
vispruner_table other-vlms "$@"
