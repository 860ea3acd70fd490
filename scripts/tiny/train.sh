#!/usr/bin/env bash
# Train the bundled model: features of the frozen tower, projector and language model, checkpoint, log and curves.
# Arguments go to `python -m llava.tiny.train`. An interrupted run resumes with the same command.
. "$(dirname -- "$0")/../_env.sh"
vispruner_env tiny
vispruner_tower
vispruner_python llava.tiny.train --output "$ROOT/playground/tiny/llava-tiny" --docs "$ROOT/docs/tiny" "$@"
