#!/usr/bin/env bash
# Evaluate the bundled model on every bundled benchmark at 576, 128, 64 and 32 tokens with every method, in one pass,
# and write a page with tables and plots:
#
#   bash scripts/tables/tiny.sh [flags of python -m llava.eval.sweep, e.g. --limit 50]
#
# 576 is the full number of tokens, so this row is the same for all methods. Rerunning the command resumes an
# interrupted run; after a finished run it only computes the tables again. The last line of output is one JSON document.
#
# Environment variables:
#   OUT_DIR   folder for answers and scores (default: outputs/ in the repository). They are written to its folder
#             tiny/KEY, where KEY identifies the bundled model and data; grid.html and its tables are in tiny/KEY/tables

here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/tiny.sh" >&2; exit 2; }
vispruner_env tiny
vispruner_tower
tiny=$ROOT/playground/tiny
key=$(cat "$tiny"/llava-tiny/model.safetensors "$tiny"/eval/SHA256SUMS | cksum)
output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")/tiny/${key%% *}
_vp_folder "$output" OUT_DIR
exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.sweep \
    --benchmarks pope,vqav2_val,gqa,vizwiz_val,scienceqa,textvqa,mme,mmbench,mmbench_cn,mmvet \
    --methods none,random,fastervlm,vispruner --tokens 128,64,32 --ratios 0.5,0 \
    --output "$output" --report "$output/tables" "$@"
