#!/usr/bin/env bash
# Compare measured scores with the LLaVA-NeXT-7B table: bash scripts/tables/llava_next_7b.sh; see scripts/_tables.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_tables.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/llava_next_7b.sh" >&2; exit 2; }
vispruner_table llava-next-7b "$@"
