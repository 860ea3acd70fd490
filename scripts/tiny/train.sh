#!/usr/bin/env bash
# Train the bundled model: features of the frozen tower, projector and language model, checkpoint, log and curves.
# Arguments go to `python -m llava.tiny.train`. An interrupted run resumes with the same command.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tiny/train.sh" >&2; exit 2; }
vispruner_env tiny
vispruner_tower
vispruner_python llava.tiny.train --output "$ROOT/playground/tiny/llava-tiny" --docs "$ROOT/docs/tiny" "$@"
