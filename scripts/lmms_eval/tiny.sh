#!/usr/bin/env bash
# Both models of the plugin in lmms-eval on the bundled benchmarks, offline: bash scripts/lmms_eval/tiny.sh [TOKENS [RATIO]]
# (default: 32 0.5). Prints lmms-eval's tables, then its scores beside ours; exits with 1 if one differs. The host of
# vispruner_hf is the bundled model converted to transformers' LLaVA. LIMIT=N questions per task (default: 100).
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_lmms.sh" || { echo "error: $0 is a copy. Run the script in its repository: bash REPOSITORY/scripts/lmms_eval/tiny.sh" >&2; exit 2; }
_vp_budget ${1+"$@"}
tokens=${TOKENS_:-32} ratio=${RATIO_:-0.5} limit=${LIMIT:-100}
work=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs/lmms_eval/tiny}")
vispruner_lmms_env
vispruner_tower
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$work/cache
vispruner_step "tasks and host"
rm -rf -- "$work/vispruner" "$work/vispruner_hf"
vispruner_python "$ROOT/scripts/lmms_eval/_tiny.py" tasks "$work"
vispruner_python "$ROOT/scripts/lmms_eval/_tiny.py" host "$work"
tasks=$(cd -- "$work/tasks" && printf '%s,' tiny_*.yaml)
tasks=${tasks//.yaml/}
same=(--tasks "${tasks%,}" --include_path "$work/tasks" --log_samples --force_simple --limit "$limit" --verbosity WARNING)
budget=method=vispruner,tokens=$tokens,important_ratio=$ratio
vispruner_step "lmms-eval --model vispruner --model_args $budget"
vispruner_lmms_eval "$work/vispruner" --model vispruner --model_args "$budget" ${same[@]+"${same[@]}"} ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
vispruner_step "lmms-eval --model vispruner_hf --model_args pretrained=$work/host,$budget"
vispruner_lmms_eval "$work/vispruner_hf" --model vispruner_hf --model_args "pretrained=$work/host,$budget" ${same[@]+"${same[@]}"} \
    ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
vispruner_step "scores of lmms-eval and ours"
vispruner_python "$ROOT/scripts/lmms_eval/_tiny.py" check "$work" vispruner vispruner_hf
