#!/usr/bin/env bash
# The set-up that every script shares: finds a Python, makes a virtual environment once, fetches the embedded tower.
#
#   source scripts/_env.sh          # from a script; also sets -euo pipefail and ROOT (the repository)
#   vispruner_env dev tiny          # environment with these extras of pyproject.toml; sets and exports PY
#   vispruner_tower                 # the embedded vision tower, fetched and converted once
#   vispruner_step "what comes"     # a heading with the elapsed time, on stderr
#   "$PY" -m llava.eval.run ...
#
#   bash scripts/_env.sh dev tiny   # only sets up
#
# Environment variables:
#   PYTHON=python3.12           what a new environment is made with (otherwise python3, python3.12, .11, .10, .13)
#   VENV=folder                 where the environment lies (otherwise .venv in the repository); reused when present
#   VISPRUNER_SYSTEM_PYTHON=1   make no environment and install nothing: use PYTHON (or python3) as it is, which
#                               must hold the core dependencies already (a GPU machine without a package registry)
# Registries and proxies are pip's own business: PIP_INDEX_URL, PIP_FIND_LINKS, HTTPS_PROXY ... are honoured.
#
# What is installed is recorded in a stamp file inside the environment, written last: an installation that was
# interrupted has no stamp and is completed by the next call; with a matching stamp nothing is asked of pip.
# Needs bash 3.2 or newer.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
export ROOT

vispruner_step() { printf '[%4d s] %s\n' "$SECONDS" "$*" >&2; }

_vp_die() {
    printf 'error: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# ---- Python -------------------------------------------------------------------------------------------------

# A command found on PATH may still be a stub that does not run (pyenv's shims), so each candidate is run.
_vp_version() { "$1" -c 'import sys; print("%d.%d.%d" % tuple(sys.version_info[:3]))' 2>/dev/null; }

_vp_recent() { "$1" -c 'import sys; sys.exit(tuple(sys.version_info[:2]) < (3, 10))' >/dev/null 2>&1; }

# Sets PY to a Python >= 3.10. python3 comes first: it is what an activated conda or pyenv means.
_vp_find_python() {
    local candidate version seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 python3.13; do
        version=$(_vp_version "$candidate") || version=""
        if [ -n "$version" ]; then
            if _vp_recent "$candidate"; then
                PY=$(command -v "$candidate")
                return 0
            fi
            seen="$seen $candidate is $version;"
        fi
        if [ -n "${PYTHON:-}" ]; then
            [ -n "$version" ] || _vp_die "PYTHON=$PYTHON does not run." "Set PYTHON to a Python 3.10 or newer."
            _vp_die "Python 3.10 or newer is needed; PYTHON=$PYTHON is $version."
        fi
    done
    [ -n "$seen" ] || _vp_die "no Python found on PATH; Python 3.10 or newer is needed." \
        "Install one, or name it: PYTHON=python3.12 bash scripts/..."
    _vp_die "Python 3.10 or newer is needed; found:${seen%;}." \
        "Install a newer one, or name it: PYTHON=python3.12 bash scripts/..."
}

# ---- stamp: does the environment hold what pyproject.toml and constraints.txt ask for? ----------------------

_VP_STAMP_CODE='
import hashlib, importlib.util, pathlib, sys

action, root, wanted = sys.argv[1], pathlib.Path(sys.argv[2]), set(sys.argv[3:])
stamp = pathlib.Path(sys.prefix, ".vispruner-stamp")
# Settings of tools come after the first [tool. table and change nothing that is installed.
project = (root / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
pins = (root / "constraints.txt").read_text(encoding="utf-8")
key = hashlib.sha256("\0".join([project, pins, str(root), sys.version]).encode()).hexdigest()
lines = stamp.read_text(encoding="utf-8").splitlines() if stamp.is_file() else []
installed = set(lines[1].split()) if len(lines) == 2 and lines[0] == key else None
lost = [name for name in ("torch", "transformers", "llava") if importlib.util.find_spec(name) is None]
if action == "check":
    sys.exit(0 if installed is not None and wanted <= installed and not lost else 3)
if action == "extras":  # what a new installation must hold: never fewer extras than an earlier script asked for
    print(" ".join(sorted(wanted | set(lines[1].split() if len(lines) == 2 else []))))
if action == "write":
    if lost:
        sys.exit("not importable after the installation: " + ", ".join(lost))
    stamp.write_text(key + "\n" + " ".join(sorted(wanted)) + "\n", encoding="utf-8")
'
_vp_stamp() { "$VENV/bin/python" -I -c "$_VP_STAMP_CODE" "$1" "$ROOT" "${@:2}"; }

_vp_ready() { [ -x "$VENV/bin/python" ] && _vp_stamp check "$@" 2>/dev/null; }

# ---- disk ---------------------------------------------------------------------------------------------------

_vp_need_space() { # folder, megabytes, what for
    local folder=$1 free
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pk "$folder" 2>/dev/null | awk 'NR == 2 {print int($4 / 1024)}') || free=""
    case $free in "" | *[!0-9]*) return 0 ;; esac
    [ "$free" -ge "$2" ] || _vp_die "not enough disk space for $3: $folder has $free MB free, about $2 MB are needed." \
        "Free some space, or put the environment elsewhere: VENV=/other/disk/venv (and TMPDIR for pip's temporary files)."
}

# ---- virtual environment ------------------------------------------------------------------------------------

_vp_make_venv() {
    local base
    if [ -x "$VENV/bin/python" ] && _vp_recent "$VENV/bin/python" && "$VENV/bin/python" -I -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    # Only a folder that is a virtual environment, or our own .venv, may be cleared.
    if [ "$VENV" != "$ROOT/.venv" ] && [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        _vp_die "VENV=$VENV exists and is not a virtual environment." "Name another folder, or move that one away."
    fi
    _vp_find_python
    base=$PY
    vispruner_step "Python $(_vp_version "$base") ($base): making the environment $VENV"
    if "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        "$base" -m venv --clear "$VENV" >&2 || _vp_die "'$base -m venv' failed in $VENV (see above)." \
            "If the disk is full, free some space or set VENV to a folder elsewhere."
    elif "$base" -m virtualenv --version >/dev/null 2>&1; then
        "$base" -m virtualenv --clear "$VENV" >&2 || _vp_die "'$base -m virtualenv' failed in $VENV (see above)."
    else
        _vp_die "$base has no venv module (ensurepip is missing), and virtualenv is not installed either." \
            "Debian, Ubuntu: apt install python$(_vp_version "$base" | cut -d. -f1,2)-venv; elsewhere: pip install virtualenv."
    fi
}

# Tells what pip's output means; pip itself only says which of its requests came last.
_vp_explain() {
    case $1 in
        *"No space left on device"* | *"Errno 28"* | *"Disk quota exceeded"*)
            _vp_die "the disk is full: pip could not write $VENV." \
                "Free about 3 GB, or put the environment elsewhere: VENV=/other/disk/venv (TMPDIR for temporary files)." \
                "The next call completes this installation." ;;
        *"Temporary failure in name resolution"* | *"Name or service not known"* | *"Failed to establish a new connection"* | \
        *"Max retries exceeded"* | *"Network is unreachable"* | *"Connection refused"* | *"timed out"* | *"ProxyError"* | \
        *"CERTIFICATE_VERIFY_FAILED"* | *"SSLError"* | *"ConnectionResetError"* | *"(from versions: none)"*)
            _vp_die "the package registry cannot be reached (pip's words above)." \
                "Check the network and the proxy (HTTPS_PROXY), or name a mirror: PIP_INDEX_URL=https://... or PIP_FIND_LINKS=folder." \
                "If this Python already holds torch and transformers, use it as it is: VISPRUNER_SYSTEM_PYTHON=1." ;;
        *"No matching distribution found"* | *"requires a different Python"*)
            _vp_die "a package has no version for Python $(_vp_version "$VENV/bin/python") on this machine (pip's words above)." \
                "Try another Python: rm -r '$VENV', then PYTHON=python3.12 bash scripts/..." ;;
        *) _vp_die "pip failed (its words above; all of them in $VENV/install.log)." ;;
    esac
}

# The first import writes the bytecode, also where PYTHONDONTWRITEBYTECODE would make every later one slow, and shows
# that what was installed runs on this machine.
_VP_FIRST_IMPORT='
import torch
from transformers import (CLIPImageProcessorPil, CLIPVisionModel, Dinov2Model, DynamicCache, LlamaForCausalLM,
                          MistralForCausalLM, PreTrainedTokenizerFast)
'

_vp_install() {
    local output rc=0 extras need=3000
    [ -d "$VENV/lib" ] && [ -n "$(find "$VENV/lib" -maxdepth 4 -type d -name torch -print -quit)" ] && need=700
    _vp_need_space "$VENV" "$need" "the environment"
    _vp_need_space "${TMPDIR:-/tmp}" 500 "pip's temporary files"
    _vp_make_venv
    PY=$VENV/bin/python
    extras=$(_vp_stamp extras "$@")
    rm -f "$VENV/.vispruner-stamp"
    # A package whose unpacking was cut short has no RECORD; pip would take it for installed.
    local info
    for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then rm -rf "$info"; fi
    done
    vispruner_step "installing vispruner${extras:+[${extras// /,}]} and what it needs (a minute or two; once)"
    # --no-compile: of some 13,000 files a small part is ever imported; _VP_FIRST_IMPORT compiles that part.
    output=$(PIP_USER=0 "$PY" -m pip install --no-input --no-compile --disable-pip-version-check --progress-bar off \
        -e "$ROOT${extras:+[${extras// /,}]}" -c "$ROOT/constraints.txt" </dev/null 2>&1 | while IFS= read -r line; do
            printf '%s\n' "$line"
            case $line in
                "  Downloading "* | "Installing collected packages"*) printf '         %s\n' "${line:0:100}" >&2 ;;
            esac
        done) || rc=$?
    printf '%s\n' "$output" >"$VENV/install.log" 2>/dev/null || true
    if [ "$rc" -ne 0 ]; then
        printf '%s\n' "$output" | tail -n 12 >&2
        _vp_explain "$output"
    fi
    PYTHONDONTWRITEBYTECODE="" "$PY" -c "$_VP_FIRST_IMPORT" >&2 || _vp_die \
        "torch and transformers are installed in $VENV but do not import (Python's words above)." \
        "A torchvision that does not match torch is a usual cause: '$PY' -m pip uninstall torchvision"
    # shellcheck disable=SC2086  # a list of extras: split at spaces
    _vp_stamp write $extras || _vp_die "the environment $VENV is incomplete; remove it and call again: rm -r '$VENV'"
    vispruner_step "environment ready: $VENV"
}

# ---- the current Python as it is ----------------------------------------------------------------------------

_VP_SYSTEM_CODE='
import importlib.metadata as metadata, pathlib, re, sys

text = pathlib.Path(sys.argv[1], "pyproject.toml").read_text(encoding="utf-8")
core = re.findall(r"\"([^\"]+)\"", re.search(r"\ndependencies = \[\n(.*?)\n\]", text, re.S).group(1))
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging")
bad = []
for requirement in map(Requirement, core):
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        bad.append(f"{requirement} (missing)")
        continue
    if not requirement.specifier.contains(found, prereleases=True):
        bad.append(f"{requirement} (found {found})")
sys.exit("; ".join(bad) or 0)
'

_vp_system() {
    local lacking
    _vp_find_python
    lacking=$("$PY" -c "$_VP_SYSTEM_CODE" "$ROOT" 2>&1) || _vp_die \
        "VISPRUNER_SYSTEM_PYTHON=1, but $PY lacks: $lacking" "Install these there, or unset VISPRUNER_SYSTEM_PYTHON."
}

# ---- what scripts call --------------------------------------------------------------------------------------

vispruner_env() { # [extra ...]
    unset PYTHONHOME
    # First on the path: another project's `llava` on the caller's PYTHONPATH must not win.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    if [ "${VISPRUNER_SYSTEM_PYTHON:-0}" = 1 ]; then
        _vp_system
    else
        VENV=${VENV:-$ROOT/.venv}
        case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
        if ! _vp_ready "$@"; then
            mkdir -p "$(dirname "$VENV")"
            if command -v flock >/dev/null 2>&1; then
                exec 9>"$VENV.lock" || _vp_die "cannot write $VENV.lock" "Set VENV to a folder that can be written."
                flock -n 9 || { vispruner_step "another set-up is at work in $VENV: waiting" && flock 9; }
            fi
            _vp_ready "$@" || _vp_install "$@"
            exec 9>&-
        fi
        PY=$VENV/bin/python
    fi
    export PY
}

vispruner_tower() { "$PY" -m llava.tiny.tower >&2; }

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    vispruner_env "$@"
    printf '%s\n' "$PY"
fi
