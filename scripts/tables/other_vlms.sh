#!/usr/bin/env bash
# Table of other models, published and measured: bash scripts/tables/other_vlms.sh; see scripts/_tables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_tables.sh"
vispruner_table other-vlms "$@"
