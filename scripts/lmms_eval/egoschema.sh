#!/usr/bin/env bash
# EgoSchema in lmms-eval: bash scripts/lmms_eval/egoschema.sh TOKENS RATIO, e.g. 227 0.5; see scripts/lmms_eval/_lmms.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_lmms.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/lmms_eval/egoschema.sh" >&2; exit 2; }
vispruner_lmms_video egoschema "$@"
