#!/usr/bin/env bash
# MSVD-QA, answers made elsewhere: msvd.sh [ANSWERS] [TOKENS RATIO]; see scripts/_eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../_eval.sh"
vispruner_video msvd "$@"
