#!/usr/bin/env bash
# All bundled benchmarks with 576, 128, 64 and 32 tokens and all methods in one pass, and a report page:
#
#   bash scripts/tables/tiny.sh [options of python -m llava.eval.sweep, e.g. --limit 50]
#
# At 576 tokens nothing is pruned, so all methods share that row. An interrupted run resumes with the same
# command; a finished one is only summarized again. The last line of output is one JSON document.
#
# Environment variables:
#   OUT_DIR   folder for the results (default: outputs/ in the repository); they go to its subfolder tiny/KEY,
#             where KEY identifies the bundled model and data, and grid.html and tables to tables/ in there

source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
vispruner_env tiny
vispruner_tower
tiny=$ROOT/playground/tiny
key=$(cat "$tiny"/llava-tiny/model.safetensors "$tiny"/eval/SHA256SUMS | cksum)
output=${OUT_DIR:-$ROOT/outputs}/tiny/${key%% *}
exec "$PY" -m llava.eval.sweep \
    --benchmarks pope,vqav2_val,gqa,vizwiz_val,scienceqa,textvqa,mme,mmbench,mmbench_cn,mmvet \
    --methods none,random,fastervlm,vispruner --tokens 128,64,32 --ratios 0.5,0 \
    --output "$output" --report "$output/tables" "$@"
