#!/usr/bin/env bash
# MSRVTT-QA, answers made elsewhere: msrvtt.sh [ANSWERS] [TOKENS RATIO]; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_video msrvtt "$@"
