#!/usr/bin/env bash
# MMBench: bash scripts/v1_6/eval/mmbench.sh TOKENS RATIO, TOKENS per crop, e.g. 32 0.5; see scripts/_eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../_eval.sh"
vispruner_eval v1_6 mmbench "$@"
