#!/usr/bin/env bash
# Compare measured scores with the LLaVA-NeXT-7B table: bash scripts/tables/llava_next_7b.sh; see scripts/_tables.sh
. "$(dirname -- "$0")/../_tables.sh"
vispruner_table llava-next-7b "$@"
