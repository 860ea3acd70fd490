#!/usr/bin/env bash
# MMBench: bash scripts/v1_6/eval/mmbench.sh TOKENS RATIO, TOKENS per crop, e.g. 32 0.5; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_eval v1_6 mmbench "$@"
