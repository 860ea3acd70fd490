#!/usr/bin/env bash
# MSVD-QA, answers made elsewhere: msvd.sh [ANSWERS] [TOKENS RATIO]; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_video msvd "$@"
