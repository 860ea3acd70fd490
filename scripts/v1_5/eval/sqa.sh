#!/usr/bin/env bash
# ScienceQA-IMG: bash scripts/v1_5/eval/sqa.sh TOKENS RATIO, e.g. 64 0.5; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_eval v1_5 scienceqa "$@"
