#!/usr/bin/env bash
# TextVQA: bash scripts/v1_5/eval/textvqa.sh TOKENS RATIO, e.g. 64 0.5; see scripts/_eval.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/v1_5/eval/textvqa.sh" >&2; exit 2; }
vispruner_eval v1_5 textvqa "$@"
