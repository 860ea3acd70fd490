#!/usr/bin/env bash
# Questions per second of model vispruner and of lmms-eval's own model llava on a POPE-like set: bash
# scripts/lmms_eval/speed.sh [TOKENS [RATIO]] [--images N] [--rounds N]; see scripts/lmms_eval/_speed.py
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_lmms.sh" || { echo "error: $0 is a copy. Run the script in its repository: bash REPOSITORY/scripts/lmms_eval/speed.sh" >&2; exit 2; }
_vp_budget ${1+"$@"}
work=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs/lmms_eval/tiny}")
vispruner_lmms_env
vispruner_tower
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$work/cache
vispruner_python "$ROOT/scripts/lmms_eval/_tiny.py" tasks "$work"
exec "$PY" "$ROOT/scripts/_launch.py" "$ROOT/scripts/lmms_eval/_speed.py" "$work" --tokens "${TOKENS_:-32}" --ratio "${RATIO_:-0.5}" \
    ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
