#!/usr/bin/env bash
# Table of LLaVA-1.5-7B, published and measured: bash scripts/tables/llava_1_5_7b.sh; see scripts/_tables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_tables.sh"
vispruner_table llava-1.5-7b "$@"
