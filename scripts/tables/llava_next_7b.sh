#!/usr/bin/env bash
# Table of LLaVA-NeXT-7B, published and measured: bash scripts/tables/llava_next_7b.sh; see scripts/_tables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_tables.sh"
vispruner_table llava-next-7b "$@"
