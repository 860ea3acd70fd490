#!/usr/bin/env bash
# MSVD-QA: msvd.sh TOKENS RATIO; scores of answers made elsewhere: msvd.sh ANSWERS [TOKENS RATIO]; see scripts/_eval.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/video/eval/msvd.sh" >&2; exit 2; }
vispruner_video msvd "$@"
