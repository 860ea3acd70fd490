#!/usr/bin/env bash
# Compare training at all tokens with training at random budgets, on the bundled model and POPE.
# Arguments go to random_budgets.py, which describes the runs. An interrupted command resumes.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/train/random_budgets.sh" >&2; exit 2; }
vispruner_env train tiny
vispruner_tower
export OMP_NUM_THREADS=1
exec "$PY" "$ROOT/scripts/train/random_budgets.py" "$@"
