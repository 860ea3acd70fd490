#!/usr/bin/env bash
# Compare measured scores with the Video-LLaVA-7B table: bash scripts/tables/video_llava_7b.sh; see scripts/_tables.sh
. "$(dirname -- "$0")/../_tables.sh"
vispruner_table video-llava-7b "$@"
