#!/usr/bin/env bash
# Set-up shared by all scripts: find a Python, create a virtual environment, download the bundled vision tower.
#
#   source scripts/_env.sh          # in a script; also sets -euo pipefail and ROOT (the repository)
#   vispruner_env dev tiny          # environment with these extras of pyproject.toml; exports PY
#   vispruner_tower                 # download and convert the bundled vision tower, once
#   vispruner_smol                  # also the language model of smol; both need the extra smol
#   vispruner_step "what follows"   # a heading with the elapsed time, on stderr
#   vispruner_python llava.eval.run ...     # a module of this repository, in the caller's folder
#
#   bash scripts/_env.sh dev tiny   # set up only; prints the path of Python
#
# Environment variables:
#   PYTHON=python3.12           Python for a new environment (default: python3, python3.12, .11, .10 or .13)
#   VENV=folder                 the environment (default: .venv in the repository); reused if it exists
#   VISPRUNER_SYSTEM_PYTHON=1   create no environment and install nothing: use PYTHON (or python3), which must
#                               have the core dependencies (for a GPU machine without a package registry)
# pip reads its usual variables for registries and proxies: PIP_INDEX_URL, PIP_FIND_LINKS, HTTPS_PROXY.
# PYTHONPATH is used with VISPRUNER_SYSTEM_PYTHON=1 only, and hides neither this repository nor the standard library.
# Relative paths in variables and arguments are relative to the caller's folder.
#
# A stamp file in the environment records what is installed. It is written last: without it, the next call
# completes the installation; with a matching stamp, pip is skipped. Requires bash 3.2 or newer.

# The first command of every script reaches this line in any shell; dash, zsh and ksh cannot run the rest.
[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
# Settings that a caller may have exported (CDPATH, POSIXLY_CORRECT, SHELLOPTS, BASH_ENV, functions) change what the
# commands below do.
set +o posix +o noclobber +o noglob
unset CDPATH BASH_ENV ENV GREP_OPTIONS
unset -f awk cat cd chmod command cut df dirname env exec find flock grep head ls mkdir printf pwd rm source tail
unalias -a
shopt -u failglob nullglob nocasematch xpg_echo
IFS=$' \t\n'
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export ROOT

vispruner_step() { printf '[%4d s] %s\n' "$SECONDS" "$*" >&2; }

_vp_die() {
    printf 'error: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# Relative to the caller's folder, and not an option if it starts with a dash.
_vp_absolute() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$PWD/$1" ;; esac; }

_vp_writable() { # folder, which need not exist yet
    local folder=$1
    while [ ! -e "$folder" ]; do folder=$(dirname -- "$folder"); done
    [ -d "$folder" ] && [ -w "$folder" ]
}

# Creates a folder for results, or names the variable to set.
_vp_folder() { # folder, variable
    if ! mkdir -p -- "$1" 2>/dev/null || [ ! -w "$1" ]; then
        _vp_die "$1: cannot be written." "The checkout or this folder is read-only for you. Set $2 to a folder that you can write."
    fi
}

# ---- Python -------------------------------------------------------------------------------------------------

# A command on PATH may be a stub that does not run (a pyenv shim), so each candidate is executed.
_vp_version() { "$1" -c 'import sys; print("%d.%d.%d" % tuple(sys.version_info[:3]))' 2>/dev/null; }

_vp_recent() { "$1" -c 'import sys; sys.exit(tuple(sys.version_info[:2]) < (3, 10))' >/dev/null 2>&1; }

# Sets PY to a Python >= 3.10. python3 comes first, because conda and pyenv activate that name.
_vp_find_python() {
    local candidate version seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 python3.13; do
        version=$(_vp_version "$candidate") || version=""
        if [ -n "$version" ]; then
            if _vp_recent "$candidate"; then
                PY=$(_vp_absolute "$(command -v "$candidate" || printf '%s\n' "$candidate")")
                return 0
            fi
            seen="$seen $candidate is $version;"
        fi
        if [ -n "${PYTHON:-}" ]; then
            [ -n "$version" ] || _vp_die "PYTHON=$PYTHON: cannot be executed." "Set PYTHON to a Python 3.10 or newer."
            _vp_die "PYTHON=$PYTHON: expected Python 3.10 or newer, got $version." "Set PYTHON to a newer one."
        fi
    done
    [ -n "$seen" ] || _vp_die "no Python found on PATH." \
        "Install Python 3.10 or newer, or set its path: PYTHON=python3.12 bash scripts/..."
    _vp_die "expected Python 3.10 or newer, found:${seen%;}." \
        "Install a newer one, or set its path: PYTHON=python3.12 bash scripts/..."
}

# ---- stamp: does the environment match pyproject.toml and constraints.txt? ----------------------------------

_VP_STAMP_CODE='
import hashlib, importlib.util, pathlib, sys

action, root, wanted = sys.argv[1], pathlib.Path(sys.argv[2]), set(sys.argv[3:])
stamp = pathlib.Path(sys.prefix, ".vispruner-stamp")
# Tool settings start at the first [tool. table and do not affect what is installed.
project = (root / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
pins = (root / "constraints.txt").read_text(encoding="utf-8")
key = hashlib.sha256("\0".join([project, pins, str(root), sys.version]).encode()).hexdigest()
lines = stamp.read_text(encoding="utf-8").splitlines() if stamp.is_file() else []
installed = set(lines[1].split()) if len(lines) == 2 and lines[0] == key else None
missing = [name for name in ("torch", "transformers", "llava") if importlib.util.find_spec(name) is None]
if action == "check":
    sys.exit(0 if installed is not None and wanted <= installed and not missing else 3)
if action == "extras":  # extras to install: those of earlier scripts are kept
    print(" ".join(sorted(wanted | set(lines[1].split() if len(lines) == 2 else []))))
if action == "write":
    if missing:
        sys.exit("not importable after the installation: " + ", ".join(missing))
    stamp.write_text(key + "\n" + " ".join(sorted(wanted)) + "\n", encoding="utf-8")
'
_vp_stamp() { "$VENV/bin/python" -I -c "$_VP_STAMP_CODE" "$1" "$ROOT" "${@:2}"; }

_vp_ready() { [ -x "$VENV/bin/python" ] && _vp_stamp check "$@" 2>/dev/null; }

# ---- disk ---------------------------------------------------------------------------------------------------

_vp_need_space() { # folder, megabytes, purpose
    local folder=$1 free
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pk "$folder" 2>/dev/null | awk 'NR == 2 {print int($4 / 1024)}') || free=""
    case $free in "" | *[!0-9]*) return 0 ;; esac
    [ "$free" -ge "$2" ] || _vp_die "$folder: not enough disk space for $3: about $2 MB needed, $free MB free." \
        "Free some space, or use another disk: VENV=/other/disk/venv (and TMPDIR for the temporary files of pip)."
}

# ---- virtual environment ------------------------------------------------------------------------------------

_vp_make_venv() {
    local base
    if [ -x "$VENV/bin/python" ] && _vp_recent "$VENV/bin/python" && "$VENV/bin/python" -I -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    # Clear only a virtual environment or the .venv of the repository.
    if [ "$VENV" != "$ROOT/.venv" ] && [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        _vp_die "VENV=$VENV: not a virtual environment." "Set VENV to another folder, or move that folder away."
    fi
    _vp_find_python
    base=$PY
    vispruner_step "Python $(_vp_version "$base") ($base): creating the environment $VENV"
    # -I, or a folder without Python files: modules in the caller's folder or on PYTHONPATH are not imported.
    if "$base" -I -c 'import venv, ensurepip' 2>/dev/null; then
        "$base" -I -m venv --clear "$VENV" >&2 || _vp_die "'$base -m venv' failed in $VENV (see above)." \
            "If the disk is full, free some space. Otherwise set VENV to a folder elsewhere: VENV=/other/disk/venv."
    elif (cd -- "$ROOT" && "$base" -m virtualenv --version) >/dev/null 2>&1; then
        (cd -- "$ROOT" && "$base" -m virtualenv --clear "$VENV") >&2 || _vp_die "'$base -m virtualenv' failed in $VENV (see above)."
    else
        _vp_die "$base has no venv module (ensurepip is missing), and virtualenv is not installed either." \
            "Debian, Ubuntu: apt install python$(_vp_version "$base" | cut -d. -f1,2)-venv; elsewhere: pip install virtualenv."
    fi
}

# Explains the output of pip. "(from versions: none)" alone is not the network: a registry that answers has no wheel
# for this machine. With the network's words, it is; but not if pip lists versions, after a request that was repeated.
_vp_explain() {
    case $1 in
        *"No space left on device"* | *"Errno 28"* | *"Disk quota exceeded"*)
            _vp_die "$VENV: the disk is full." \
                "Free about 3 GB, or use another disk: VENV=/other/disk/venv (TMPDIR for temporary files)." \
                "The next call completes this installation." ;;
        *"Read-only file system"* | *"Errno 30"* | *"Permission denied"* | *"Errno 13"*)
            _vp_die "$VENV: a folder cannot be written (see the output of pip above)." \
                "Set VENV to a folder that you can write: VENV=/other/folder/venv (TMPDIR for temporary files)." ;;
        *"(from versions: "[0-9]*) _vp_no_build ;;
        *"Temporary failure in name resolution"* | *"Name or service not known"* | *"nodename nor servname"* | \
        *"Failed to establish a new connection"* | *"Max retries exceeded"* | *"Network is unreachable"* | \
        *"connection broken by"* | *"Connection refused"* | *"timed out"* | *"ProxyError"* | *"Could not fetch URL"* | \
        *"CERTIFICATE_VERIFY_FAILED"* | *"SSLError"* | *"ConnectionResetError"* | *"HTTP error"* | *"Client Error"* | *"Server Error"*)
            _vp_die "the package registry cannot be reached (see the output of pip above)." \
                "Check the network and the proxy (HTTPS_PROXY), or set a mirror: PIP_INDEX_URL=https://... or PIP_FIND_LINKS=folder." \
                "If your Python already has torch and transformers, use it directly: VISPRUNER_SYSTEM_PYTHON=1." ;;
        *"ResolutionImpossible"* | *"conflicting dependencies"*)
            _vp_die "the versions asked for contradict each other (see the output of pip above)." \
                "Unset PIP_CONSTRAINT and look for 'constraint' in 'pip config list': constraints.txt is used in addition." ;;
        *"No matching distribution found"* | *"requires a different Python"* | *"(from versions: none)"* | \
        *"is not a supported wheel"* | *"Failed building wheel"* | *"Failed to build"* | *"metadata-generation-failed"*)
            _vp_no_build ;;
        *) _vp_die "pip failed (see above; the full output is in $VENV/install.log)." ;;
    esac
}

_vp_no_build() {
    local python machine
    python=$(_vp_version "$VENV/bin/python") || python="this version"
    machine=$(uname -sm 2>/dev/null) || machine="this system"
    _vp_die "a package has no build for Python $python on $machine (see the output of pip above and $VENV/install.log)." \
        "Try another Python: rm -r '$VENV', then PYTHON=python3.12 bash scripts/...; 32-bit and musl systems have no torch." \
        "If PIP_INDEX_URL, PIP_FIND_LINKS or PIP_NO_INDEX is set, the package may be missing there."
}

# The first import writes the bytecode, even under PYTHONDONTWRITEBYTECODE, which would slow down every later
# import, and checks that the installed packages run on this machine.
_VP_FIRST_IMPORT='
import torch
from transformers import (CLIPImageProcessorPil, CLIPVisionModel, Dinov2Model, DynamicCache, LlamaForCausalLM,
                          MistralForCausalLM, PreTrainedTokenizerFast)
'

# Prints the output of pip, and its progress on stderr.
_vp_progress() {
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in
            "  Downloading "* | "Installing collected packages"*) printf '         %s\n' "${line:0:100}" >&2 ;;
        esac
    done
}

# Runs in a subshell: variables that install elsewhere are unset for pip only.
_vp_pip() (
    unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_DRY_RUN
    export PIP_USER=0
    exec "$PY" -I -m pip "$@"
)

_vp_install() {
    local output rc=0 extras need=3000 line wanted=()
    [ -d "$VENV/lib" ] && [ -n "$(find "$VENV/lib" -maxdepth 4 -type d -name torch -print -quit)" ] && need=700
    _vp_need_space "$VENV" "$need" "the environment"
    _vp_need_space "${TMPDIR:-/tmp}" 500 "pip's temporary files"
    _vp_make_venv
    PY=$VENV/bin/python
    extras=$(_vp_stamp extras "$@")
    rm -f -- "$VENV/.vispruner-stamp"
    # A package that was unpacked only partly has no RECORD, but pip would treat it as installed.
    local info
    for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then rm -rf -- "$info"; fi
    done
    if _vp_writable "$ROOT"; then
        wanted=(-e "$ROOT${extras:+[${extras// /,}]}")
    else # pip writes into the checkout it installs from
        # shellcheck disable=SC2086  # a list of extras, split at spaces
        while IFS= read -r line; do wanted+=("$line"); done <<<"$("$PY" -I "$ROOT/scripts/_requirements.py" list "$ROOT" $extras)"
    fi
    vispruner_step "installing vispruner${extras:+[${extras// /,}]} and its dependencies (once; one to two minutes)"
    # --no-compile: few of some 13,000 files are ever imported; _VP_FIRST_IMPORT compiles those.
    wanted+=(--no-input --no-compile --disable-pip-version-check --progress-bar off -c "$ROOT/constraints.txt")
    output=$(_vp_pip install ${wanted[@]+"${wanted[@]}"} </dev/null 2>&1 | _vp_progress) || rc=$?
    printf '%s\n' "$output" >"$VENV/install.log" 2>/dev/null || true
    if [ "$rc" -ne 0 ]; then
        printf '%s\n' "$output" | tail -n 12 >&2
        _vp_explain "$output"
    fi
    if ! _vp_writable "$ROOT"; then
        for info in "$VENV"/lib/python*/site-packages; do printf '%s\n' "$ROOT" >"$info/vispruner-checkout.pth"; done
    fi
    "$PY" -I -c "$_VP_FIRST_IMPORT" >&2 || _vp_die \
        "$VENV: torch and transformers are installed but cannot be imported (see above)." \
        "A torchvision that does not match torch is a common cause. Try: '$PY' -m pip uninstall torchvision"
    # shellcheck disable=SC2086  # a list of extras, split at spaces
    _vp_stamp write $extras || _vp_die "$VENV: the environment is incomplete (see above)." "Remove it and retry: rm -r '$VENV'"
    vispruner_step "environment ready: $VENV"
}

# ---- a Python outside any environment of ours ---------------------------------------------------------------

_vp_system() {
    local missing
    _vp_find_python
    missing=$(vispruner_python "$ROOT/scripts/_requirements.py" check "$ROOT" 2>&1) || _vp_die \
        "VISPRUNER_SYSTEM_PYTHON=1: $PY does not have: $missing" "Install these, or unset VISPRUNER_SYSTEM_PYTHON."
}

# ---- functions for scripts ----------------------------------------------------------------------------------

# Runs a module of this repository, not one of that name in the caller's folder or on PYTHONPATH.
vispruner_python() { "$PY" "$ROOT/scripts/_launch.py" "$@"; }

vispruner_env() { # [extra ...]
    unset PYTHONHOME
    # Only _launch.py uses the caller's PYTHONPATH, after Python has started.
    [ "${PYTHONPATH:-}" = "$ROOT" ] || export _VP_PYTHONPATH="${PYTHONPATH:-}"
    export PYTHONPATH="$ROOT"
    case ${VISPRUNER_SYSTEM_PYTHON:-0} in
        0 | 1) ;;
        *) _vp_die "VISPRUNER_SYSTEM_PYTHON=$VISPRUNER_SYSTEM_PYTHON: expected 0 or 1." "Set it to 1, or unset it." ;;
    esac
    if [ "${VISPRUNER_SYSTEM_PYTHON:-0}" = 1 ]; then
        _vp_system
    else
        unset _VP_PYTHONPATH
        VENV=$(_vp_absolute "${VENV:-$ROOT/.venv}")
        if ! _vp_ready "$@"; then
            _vp_writable "$VENV" || _vp_die "$VENV: cannot be created or written: this folder is read-only for you." \
                "Set VENV to a folder that you can write, for this and later calls: export VENV=/other/folder/venv"
            mkdir -p -- "$(dirname -- "$VENV")"
            if command -v flock >/dev/null 2>&1 && [ -w "$(dirname -- "$VENV")" ]; then
                exec 9>"$VENV.lock" || _vp_die "$VENV.lock: cannot be written." "Set VENV to a folder that you can write."
                flock -n 9 || { vispruner_step "waiting for another set-up of $VENV" && flock 9; }
            fi
            _vp_ready "$@" || _vp_install "$@"
            exec 9>&-
        fi
        PY=$VENV/bin/python
    fi
    export PY
}

vispruner_tower() { vispruner_python llava.tiny.tower >/dev/null; }
vispruner_smol() { vispruner_tower && vispruner_python llava.tiny.base >/dev/null; }

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    vispruner_env "$@"
    printf '%s\n' "$PY"
fi
