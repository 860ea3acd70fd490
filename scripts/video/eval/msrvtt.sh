#!/usr/bin/env bash
# MSRVTT-QA: msrvtt.sh TOKENS RATIO; scores of answers made elsewhere: msrvtt.sh ANSWERS [TOKENS RATIO]; see scripts/_eval.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/video/eval/msrvtt.sh" >&2; exit 2; }
vispruner_video msrvtt "$@"
