#!/usr/bin/env bash
# TGIF-QA, answers made elsewhere: tgif.sh [ANSWERS] [TOKENS RATIO]; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_video tgif "$@"
