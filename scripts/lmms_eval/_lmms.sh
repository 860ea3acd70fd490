#!/usr/bin/env bash
# Shared by the scripts of this folder: lmms-eval with pruning, in an environment of its own.
#
#   source scripts/lmms_eval/_lmms.sh; vispruner_lmms TASKS "$@"        # tasks of lmms-eval, separated by commas
#   "$@": [TOKENS [RATIO]] [options of lmms-eval eval]; without TOKENS, no pruning. With HOST, TOKENS is per image
#   or crop; of a video task (vispruner_lmms_video), it is per clip.
#
# Environment variables:
#   CKPT_DIR, CKPT   as in scripts/_eval.sh; without them the bundled model, or with HOST the host's own default
#   HOST             a model of transformers, such as qwen2_5_vl or llava: --model vispruner_hf instead of vispruner
#   METHOD           pruning method (default: vispruner)
#   OUT_DIR          folder for results (default: outputs/lmms_eval in the repository)
#   PYTHON           Python of a virtual environment that has, or gets, lmms-eval; another Python makes a new one
#   VENV             folder of the environment (default: .venv-lmms in the repository)
#   CUDA_VISIBLE_DEVICES=0,1,2,3   one process per GPU (accelerate launch); VISPRUNER_PROCESSES=N sets another number
#   HF_HOME, HF_TOKEN and others   read by lmms-eval, which downloads the data of its tasks from the Hub
# With VISPRUNER_SYSTEM_PYTHON=1 nothing is installed: PYTHON (or python3) has lmms-eval.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/../_eval.sh"
VP_LMMS_TORCHVISION=0.28.0 # of the torch in constraints.txt

# A CUDA build of torch on a machine without a GPU is gigabytes of packages that do not run.
_vp_lmms_no_gpu() { ! command -v nvidia-smi >/dev/null 2>&1 && [ ! -e /proc/driver/nvidia/version ]; }

_VP_LMMS_CUDA='
import json, sys
found = json.load(sys.stdin)["install"]
needs = [one for item in found for one in item["metadata"].get("requires_dist", [])]
sys.exit(3 if any(one.startswith("nvidia-") or one.startswith("cuda-") for one in needs) else 0)
'

_vp_lmms_prepare() { # before pip installs the extra, on a machine without a GPU
    local folder rc=0
    _vp_make_venv
    PY=$VENV/bin/python
    if ! "$PY" -I -c 'import torch' 2>/dev/null; then
        _vp_pip install --quiet --dry-run --no-deps --ignore-installed --report - torch -c "$ROOT/constraints.txt" 2>/dev/null |
            "$PY" -I -c "$_VP_LMMS_CUDA" 2>/dev/null || rc=$?
        [ "$rc" -ne 3 ] || _vp_die \
            "torch: the package registry offers a CUDA build for this machine, which has no NVIDIA GPU." \
            "Name a folder or an index with the CPU build: PIP_FIND_LINKS=folder or PIP_EXTRA_INDEX_URL=index of PyTorch's CPU builds."
    fi
    if ! "$PY" -I -c 'import torchvision' 2>/dev/null; then
        folder=$(mktemp -d)
        "$PY" -I "$ROOT/scripts/lmms_eval/_placeholder.py" "$folder" "$VP_LMMS_TORCHVISION" >/dev/null
        _vp_pip install --quiet --no-deps --force-reinstall --disable-pip-version-check "$folder"/*.whl >&2 || _vp_die \
            "torchvision: the placeholder without modules could not be installed (see above)."
        rm -rf -- "$folder"
    fi
}

_VP_LMMS_CHECK='
import importlib.util, sys
import torch, transformers
from lmms_eval.models import get_model_manifest
if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
    import torchvision.ops  # a build that does not match torch fails here
missing = [name for name in ("vispruner", "vispruner_hf") if get_model_manifest(name) is None]
sys.exit("entry points are missing: " + ", ".join(missing) if missing else 0)
'

vispruner_lmms_env() { # sets PY to a Python with lmms-eval
    local own
    export HF_HUB_DISABLE_TELEMETRY=1
    if [ "${VISPRUNER_SYSTEM_PYTHON:-0}" = 1 ]; then
        vispruner_env
        "$PY" -c 'import lmms_eval' 2>/dev/null || _vp_die "VISPRUNER_SYSTEM_PYTHON=1: $PY does not have lmms-eval." \
            "Install it (pip install -e '.[eval]'), or unset VISPRUNER_SYSTEM_PYTHON."
        return 0
    fi
    if [ -n "${PYTHON:-}" ]; then # in a virtual environment: that one
        own=$("$PYTHON" -I -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")' 2>/dev/null) || own=""
        [ -z "$own" ] || VENV=$own
    fi
    VENV=$(_vp_absolute "${VENV:-$ROOT/.venv-lmms}")
    if ! _vp_ready eval; then
        ! _vp_lmms_no_gpu || _vp_lmms_prepare
        export PIP_CONSTRAINT="$ROOT/scripts/lmms_eval/constraints.txt${PIP_CONSTRAINT:+ $PIP_CONSTRAINT}"
        vispruner_env eval
        "$PY" -c "$_VP_LMMS_CHECK" >&2 || _vp_die "$VENV: lmms-eval is installed, but does not work (see above)." \
            "Remove the environment and retry: rm -r '$VENV'"
    else
        vispruner_env eval
    fi
}

_vp_lmms_results() { find "$1" -name '*_results.json' | grep -c . || true; }

# lmms-eval itself: in one process, or one per GPU. It exits with 0 after an error, so a result is looked for.
vispruner_lmms_eval() { # output folder, arguments of `lmms-eval eval`
    local output=$1 processes before launch=(-m lmms_eval eval)
    shift
    mkdir -p -- "$output"
    before=$(_vp_lmms_results "$output")
    processes=$(_vp_processes)
    if [ "$processes" != 1 ]; then launch=(-m accelerate.commands.launch --num_processes "$processes" ${launch[@]+"${launch[@]}"}); fi
    "$PY" ${launch[@]+"${launch[@]}"} --output_path "$output" "$@" || return $?
    [ "$(_vp_lmms_results "$output")" -gt "$before" ] || {
        echo "error: lmms-eval wrote no result to $output (see its error above)" >&2
        return 1
    }
}

_vp_lmms_run() { # name of the budget, tasks, arguments
    local budget=$1 tasks=$2 args=() model=vispruner
    shift 2
    _vp_budget ${1+"$@"}
    MODEL_=""
    if [ -n "${CKPT_DIR:-}${CKPT:-}" ]; then _vp_checkpoint llava-v1.5-7b; fi
    if [ -n "$MODEL_" ]; then args+=("pretrained=$MODEL_"); fi
    if [ -n "${HOST:-}" ]; then
        model=vispruner_hf
        args+=("host=$HOST")
    elif [ -n "$MODEL_" ]; then
        _vp_published
        args+=("preset=${VISPRUNER_PRESET:-exact}")
        unset VISPRUNER_PRESET
    fi
    if [ -n "$TOKENS_" ] && [ "$TOKENS_" != none ]; then
        args+=("method=${METHOD:-vispruner}" "$budget=$TOKENS_")
        if [ -n "$RATIO_" ]; then args+=("important_ratio=$RATIO_"); fi
    fi
    vispruner_lmms_env
    if [ -z "${HOST:-}" ] && _vp_is_smol; then
        vispruner_smol
    elif [ -z "${HOST:-}$MODEL_" ]; then
        vispruner_tower
    fi
    local joined
    joined=$(IFS=,; echo "${args[*]-}")
    vispruner_lmms_eval "$(_vp_path "${OUT_DIR:-$ROOT/outputs/lmms_eval}")" --model "$model" --model_args "$joined" \
        --tasks "$tasks" --log_samples ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
}

vispruner_lmms() { _vp_lmms_run tokens "$@"; }

vispruner_lmms_video() {
    HOST=${HOST:-video_llava}
    _vp_lmms_run clip_tokens "$@"
}
