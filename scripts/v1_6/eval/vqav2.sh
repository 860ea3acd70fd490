#!/usr/bin/env bash
# VQAv2: bash scripts/v1_6/eval/vqav2.sh TOKENS RATIO, TOKENS per crop, e.g. 32 0.5; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_eval v1_6 vqav2 "$@"
