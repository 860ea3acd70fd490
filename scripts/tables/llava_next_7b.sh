#!/usr/bin/env bash
# The table of LLaVA-NeXT-7B, what was measured beside it: bash scripts/tables/llava_next_7b.sh; see scripts/_tables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_tables.sh"
vispruner_table llava-next-7b "$@"
