#!/usr/bin/env bash
# ActivityNet-QA, answers made elsewhere: activitynet.sh [ANSWERS] [TOKENS RATIO]; see scripts/_eval.sh
. "$(dirname -- "$0")/../../_eval.sh"
vispruner_video activitynet "$@"
