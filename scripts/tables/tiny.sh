#!/usr/bin/env bash
# Every embedded set x 576, 128, 64 and 32 tokens x every method, in one pass, and the page about it:
#
#   bash scripts/tables/tiny.sh [flags of python -m llava.eval.sweep, e.g. --limit 50]
#
# 576 tokens are all there are, so that row is one for all methods. Stopped, the same command goes on; finished,
# it asks nothing and only adds up again. The last line of output is one JSON document.
#
# Environment variables:
#   OUT_DIR   where answers and scores go, default outputs/ in the repository: its folder tiny/KEY, where KEY tells
#             the embedded model and data; grid.html and its tables go to the folder tables/ in there

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
