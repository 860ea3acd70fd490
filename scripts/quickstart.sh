#!/usr/bin/env bash
# From a clean clone to a table: makes the environment, fetches the embedded tower, draws which patches of a photograph
# VisPruner keeps, and lets the embedded LLaVA answer the embedded POPE-style questions at 576, 128, 64 and 32 visual
# tokens with every method. Ends in the table and, as the last line of stdout, one JSON document.
#   bash scripts/quickstart.sh [further arguments of python -m llava.eval.sweep]
# Environment: IMAGE (the photograph), OUTPUT (where answers and the picture go), and those of scripts/_env.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
OUTPUT=${OUTPUT:-$ROOT/playground/tiny/results/quickstart}
case $OUTPUT in /*) ;; *) OUTPUT=$PWD/$OUTPUT ;; esac
if [ -n "${IMAGE:-}" ]; then
    [ -f "$IMAGE" ] || _vp_die "IMAGE=$IMAGE is no file."
    case $IMAGE in /*) ;; *) IMAGE=$PWD/$IMAGE ;; esac
fi

vispruner_env tiny
vispruner_step "embedded vision tower"
vispruner_tower
cd "$ROOT"
mkdir -p "$OUTPUT"
export TOKENIZERS_PARALLELISM=false

if [ -z "${IMAGE:-}" ]; then # a photograph if one is embedded, else the first picture of the benchmark
    for IMAGE in playground/tiny/photos/*.jpg playground/tiny/photos/*.png playground/tiny/photos/*.webp \
        playground/tiny/eval/pope/val2014/*; do
        [ ! -f "$IMAGE" ] || break
    done
fi
vispruner_step "kept patches of $IMAGE at 64 of 576 tokens"
"$PY" -m llava.analysis.overlay --image "$IMAGE" --tokens 64 --output "$OUTPUT/overlay.png" >&2

vispruner_step "embedded POPE at 576, 128, 64, 32 visual tokens"
"$PY" -m llava.eval.sweep --benchmarks pope --methods none,random,fastervlm,vispruner --tokens 128,64,32 \
    --ratios 0.5,0 --output "$OUTPUT" "$@"
vispruner_step "done; the picture: $OUTPUT/overlay.png"
