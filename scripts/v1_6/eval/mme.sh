#!/usr/bin/env bash
# MME: bash scripts/v1_6/eval/mme.sh TOKENS RATIO, TOKENS per crop, e.g. 32 0.5; see scripts/_eval.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/v1_6/eval/mme.sh" >&2; exit 2; }
vispruner_eval v1_6 mme "$@"
