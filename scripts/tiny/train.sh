#!/usr/bin/env bash
# Train the bundled model: features of the frozen tower, projector and language model, checkpoint, log and curves.
# Arguments go to `python -m llava.tiny.train`. An interrupted run resumes with the same command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
vispruner_env tiny
vispruner_tower
cd "$ROOT"
"$PY" -m llava.tiny.train --output playground/tiny/llava-tiny --docs docs/tiny "$@"
