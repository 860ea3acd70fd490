#!/usr/bin/env bash
# Lint, format check and tests, from a clean clone: creates the environment and downloads the bundled tower if missing.
#   bash scripts/test.sh [--slow] [pytest arguments, e.g. tests/pruning -k golden; paths relative to your folder or the repository]
#
#   --slow   also tests that install packages, compile, or train in several processes (VISPRUNER_SLOW=1); installs the
#            extra deepspeed, whose CPU operators are compiled at first use (a C++ compiler is needed; two minutes)
# Without it, works offline once installed. Exit code 0: ruff reports nothing and every test passed.
# shellcheck source-path=SCRIPTDIR source=_env.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/test.sh" >&2; exit 2; }
extras=(dev tiny)
if [ "${1:-}" = --slow ]; then
    shift
    export VISPRUNER_SLOW=1
fi
if [ "${VISPRUNER_SLOW:-0}" = 1 ]; then extras+=(train deepspeed); fi
vispruner_env ${extras[@]+"${extras[@]}"}
vispruner_step "bundled vision tower (downloaded once)"
vispruner_tower
# Paths that exist in the caller's folder are made absolute before the change to the repository.
arguments=() previous=""
for argument in ${1+"$@"}; do
    case $previous:$argument in
        -[kmnopWr]:*) ;; # the value of an option
        *:--junitxml=[!/]* | *:--junit-xml=[!/]* | *:--basetemp=[!/]* | *:--log-file=[!/]* | *:--ignore=[!/]* | *:--deselect=[!/]*)
            argument=${argument%%=*}=$PWD/${argument#*=} ;;
        *:-* | *:/*) ;;
        *) [ ! -e "${argument%%::*}" ] || argument=$PWD/$argument ;;
    esac
    arguments+=("$argument")
    previous=$argument
done
cd -- "$ROOT"
# One torch thread per test process: two processes use two cores better than two threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

status=0
vispruner_step "ruff check, ruff format --check"
if vispruner_python ruff --version >/dev/null 2>&1; then
    vispruner_python ruff check . || status=$?
    vispruner_python ruff format --check . || status=$?
else
    echo "ruff is not installed in $PY: lint skipped" >&2
fi
vispruner_step "pytest"
workers=()
if "$PY" -c 'import xdist' 2>/dev/null; then workers=(-n auto --maxprocesses 4); fi
vispruner_python pytest -q ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"} || status=$? # 5: no test ran
exit "$status"
