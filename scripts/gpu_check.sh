#!/usr/bin/env bash
# Check and measure on one GPU everything that the documents claim about GPUs: every test marked gpu, then baseline and
# optimized code, pruned and unpruned, at the sizes of LLaVA-1.5-7B, LLaVA-NeXT-7B and Video-LLaVA-7B. Takes less than
# nine minutes and writes report.md (goals first) and gpu_check.json to outputs/gpu.
#
#   bash scripts/gpu_check.sh [PART ...] [flags of python -m llava.analysis.efficiency gpu_check, e.g. --again]
#   bash scripts/gpu_check.sh --device cpu --dummy-model tiny --output DIR     # a rehearsal without a GPU
#
# What the folder already contains for this card and these versions is kept, so an interrupted run is resumed by the same
# command. The last line of output is one JSON document.
#
# Environment variables:
#   OUT_DIR   the report is written to its folder gpu/ (default: outputs/ in the repository)

here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/gpu_check.sh" >&2; exit 2; }
vispruner_env dev tiny
[ "${VISPRUNER_SYSTEM_PYTHON:-0}" = 1 ] || vispruner_tower || vispruner_step "no bundled vision tower (see above): the part pope will not be measured"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PY" "$ROOT/scripts/_launch.py" llava.analysis.efficiency gpu_check \
    --output "$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")/gpu" "$@"
