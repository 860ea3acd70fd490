#!/usr/bin/env bash
# Compare measured scores with the LLaVA-1.5-7B table: bash scripts/tables/llava_1_5_7b.sh; see scripts/_tables.sh
. "$(dirname -- "$0")/../_tables.sh"
vispruner_table llava-1.5-7b "$@"
