#!/usr/bin/env bash
# Run the tests with the oldest and newest allowed Python, torch, transformers, Pillow and numpy, and print a table.
#
#   bash scripts/check_versions.sh [--quick] [--only NAME,NAME] [--list] [pytest arguments]
#
#   --quick   only the tests that depend on versions: images, towers, checkpoints, decoding, pruning
#   --only    only these combinations; --list prints their names
#
# A combination is not available if its Python is missing or pip cannot install it; the reason is printed. Exit code 1:
# a combination failed, or none was available. Environments and results are kept, so that the same command resumes an
# interrupted run: a result counts until the code or the arguments change. On Linux, a torch from PyPI takes 5 GB; set
# PIP_EXTRA_INDEX_URL to an index of CPU builds to avoid that.
#
# Environment variables:
#   VERSIONS_DIR   folder for environments, logs and results (default: .venv-versions in the repository)

# shellcheck source-path=SCRIPTDIR source=_env.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/check_versions.sh" >&2; exit 2; }

# Name, Python ("any": 3.11 if present), torch, other packages. "pinned" is constraints.txt, "oldest" the lower bounds
# of pyproject.toml, "newest" what pip chooses; the other columns change one package of the pinned set.
COMBINATIONS='pinned-3.10 3.10 pinned pinned
pinned-3.11 3.11 pinned pinned
pinned-3.12 3.12 pinned pinned
pinned-3.13 3.13 pinned pinned
newest any newest newest
transformers-oldest any pinned transformers=oldest
pillow-10 any pinned pillow==10.*
pillow-12 any pinned pillow==12.*
pillow-13 any pinned pillow==13.*
torch-oldest 3.10 oldest torch=oldest
oldest 3.10 oldest oldest'
QUICK='tests/model tests/test_image_files.py tests/test_mm_utils.py tests/eval/inference tests/pruning'

# Prints the path of a Python of this version: on PATH, else of pyenv.
_vp_python_of() { # version or any
    local version candidate
    for version in ${1/any/3.11 3.12 3.10 3.13}; do
        for candidate in "python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python; do
            if [ "$(_vp_version "$candidate" | cut -d. -f1,2)" = "$version" ]; then
                command -v "$candidate"
                return 0
            fi
        done
    done
    return 1
}

# Installs packages into an environment, unless this was done before.
_vp_install_into() { # folder, python, which versions, name of the only package
    local folder=$1 python=$2 which=$3 options=() wanted site
    wanted=$("$python" -I "$ROOT/scripts/_requirements.py" versions "$ROOT" "$which" ${4+"$4"})
    [ "$which" != newest ] || options=(--upgrade)
    [ "$which" != pinned ] || options=(-c "$ROOT/constraints.txt")
    if [ "$(cat "$folder/.ready" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    mkdir -p -- "$folder"
    [ -x "$folder/bin/python" ] || "$python" -I -m venv "$folder" >"$folder/pip.log" 2>&1 || return 1
    if [ -n "${BASE:-}" ]; then # packages of the base that are not installed here are used from there
        for site in "$BASE"/lib/python*/site-packages; do
            printf 'import site; site.addsitedir("%s")\n' "$site" >"$(echo "$folder"/lib/python*/site-packages)/base.pth"
        done
    fi
    printf '%s\n' "$wanted" >"$folder/requirements.txt"
    PY=$folder/bin/python
    _vp_pip install --no-input --no-compile --disable-pip-version-check --progress-bar off \
        ${options[@]+"${options[@]}"} -r "$folder/requirements.txt" </dev/null >"$folder/pip.log" 2>&1 || return 1
    printf '%s\n' "$wanted" >"$folder/.ready"
}

# Sets RESULT, and VERSIONS if the environment is complete.
_vp_check() { # name, version of Python, torch, packages, arguments of pytest
    local name=$1 version=$2 torch=$3 packages=$4 python folder base key=""
    VERSIONS="- - - - -"
    RESULT="not available: no Python $version"
    python=$(_vp_python_of "$version") || return 0
    folder=$VERSIONS_DIR/$name
    vispruner_step "$name: environment $folder"
    version=$(_vp_version "$python")
    base=$VERSIONS_DIR/torch-$torch-python${version%.*} # shared: torch is large
    if ! BASE="" _vp_install_into "$base" "$python" "$torch" torch; then
        RESULT="not available: $(_vp_reason "$base/pip.log")"
        return 0
    fi
    if ! BASE=$base _vp_install_into "$folder" "$python" "$packages"; then
        RESULT="not available: $(_vp_reason "$folder/pip.log")"
        return 0
    fi
    PY=$folder/bin/python
    VERSIONS=$("$PY" -I "$ROOT/scripts/_requirements.py" installed "$ROOT" torch transformers pillow numpy)
    shift 4
    key=$(_vp_state "$VERSIONS" "$@")
    if [ -n "$key" ] && [ "$(head -n 1 "$folder/result" 2>/dev/null)" = "$key" ]; then
        RESULT=$(tail -n 1 "$folder/result")
        return 0
    fi
    vispruner_step "$name: Python, torch, transformers, Pillow, numpy $VERSIONS: pytest (log: $folder/pytest.log)"
    local status=0
    { vispruner_tower && vispruner_python pytest -q -p no:cacheprovider "$@"; } </dev/null >"$folder/pytest.log" 2>&1 || status=$?
    RESULT=$(grep -E '[0-9]+ (passed|failed|errors?).* in [0-9.]+s' "$folder/pytest.log" | tail -n 1 | sed 's/^=* *//; s/ *=*$//') || true
    if [ "$status" -eq 0 ]; then RESULT="passed: $RESULT"; else RESULT="FAILED: ${RESULT:-exit code $status, see $folder/pytest.log}"; fi
    if [ "$status" -le 1 ]; then printf '%s\n%s\n' "$key" "$RESULT" >"$folder/result"; fi # not if interrupted
}

_vp_reason() { # log of pip
    grep -iE '^ *(ERROR|error):?' "$1" | tail -n 1 | cut -c1-150 || tail -n 1 "$1" | cut -c1-150
}

# Prints a key of the code, the versions and the arguments; nothing outside a git checkout.
_vp_state() {
    git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1 || return 0
    { git -C "$ROOT" rev-parse HEAD && git -C "$ROOT" diff HEAD && printf '%s\n' "$@"; } | cksum
}

arguments=() only="" quick="" workers=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --only) only=,${2:?--only needs names}, && shift ;;
        --only=*) only=,${1#*=}, ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --list) printf '%s\n' "$COMBINATIONS" && exit 0 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
for name in ${only//,/ }; do
    case $COMBINATIONS in "$name "* | *$'\n'"$name "*) ;; *) _vp_die "--only $name: unknown combination." "Choose from the names of --list." ;; esac
done
# shellcheck disable=SC2206  # a list of paths without spaces
[ -z "$quick" ] || arguments=($QUICK ${arguments[@]+"${arguments[@]}"})
[ -n "$quick" ] || workers=(-n auto --maxprocesses 4)
VERSIONS_DIR=$(_vp_absolute "${VERSIONS_DIR:-$ROOT/.venv-versions}")
_vp_folder "$VERSIONS_DIR" VERSIONS_DIR
unset PYTHONHOME VISPRUNER_SYSTEM_PYTHON
export PYTHONPATH="$ROOT" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd -- "$ROOT"

table="" failed=0 passed=0
while read -r name python torch packages; do
    case $only in "" | *,"$name",*) ;; *) continue ;; esac
    _vp_check "$name" "$python" "$torch" "$packages" ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"}
    case $RESULT in passed*) passed=1 ;; FAILED*) failed=1 ;; esac
    # shellcheck disable=SC2086  # five words
    line=$(printf '%-20s %-8s %-12s %-13s %-8s %-8s %s' "$name" $VERSIONS "$RESULT")
    vispruner_step "$line"
    table=$table$line$'\n'
done <<<"$COMBINATIONS"
printf '%-20s %-8s %-12s %-13s %-8s %-8s %s\n%s' combination Python torch transformers Pillow numpy result "$table"
[ "$failed" = 0 ] && [ "$passed" = 1 ]
