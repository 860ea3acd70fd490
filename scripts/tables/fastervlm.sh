#!/usr/bin/env bash
# Compare measured scores with the tables of the paper's predecessor: bash scripts/tables/fastervlm.sh; see scripts/_tables.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_tables.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/fastervlm.sh" >&2; exit 2; }
vispruner_table fastervlm "$@"
