#!/usr/bin/env bash
# Lint and tests, from a clean clone: makes the environment and fetches the embedded tower when they are missing.
#   bash scripts/test.sh [pytest arguments, e.g. tests/pruning -k golden; paths from the repository's root]
# Offline once installed. Exit code 0: the lint is clean and every test passed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
vispruner_env dev tiny
vispruner_tower
cd "$ROOT"
# One torch thread per test process: two processes use two cores better than two threads do.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

status=0
vispruner_step "ruff"
if "$PY" -m ruff --version >/dev/null 2>&1; then
    "$PY" -m ruff check . || status=$?
else
    echo "ruff is not installed in $PY: lint left out" >&2
fi
vispruner_step "pytest"
workers=()
if "$PY" -c 'import xdist' 2>/dev/null; then workers=(-n auto --maxprocesses 4); fi
"$PY" -m pytest -q ${workers[@]+"${workers[@]}"} "$@" || status=$? # 5: no test ran
exit "$status"
