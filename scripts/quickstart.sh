#!/usr/bin/env bash
# From a clean clone to a table: create the environment, download the bundled vision tower, draw the patches of a
# photograph that VisPruner keeps, and evaluate the bundled LLaVA on the bundled POPE with all methods at 576, 128, 64
# and 32 visual tokens. Prints a table and, as the last line of stdout, one JSON document.
#   bash scripts/quickstart.sh [options of python -m llava.eval.sweep]
#   bash scripts/quickstart.sh --model smol, or SMOL=1 bash scripts/quickstart.sh: 10 questions about each of 40 images,
#   answered by the larger bundled model (docs/smol.md), with no pruning, VisPruner and random tokens
# Environment: IMAGE (the photograph), OUTPUT (folder for answers and overlay.png), and the variables of scripts/_env.sh.
# shellcheck source-path=SCRIPTDIR source=_env.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/quickstart.sh" >&2; exit 2; }
OUTPUT=$(_vp_absolute "${OUTPUT:-$ROOT/playground/tiny/results/quickstart}")
if [ -n "${IMAGE:-}" ]; then
    [ -f "$IMAGE" ] || _vp_die "IMAGE=$IMAGE: no such file." "Set IMAGE to an image file, or unset it."
    IMAGE=$(_vp_absolute "$IMAGE")
fi

MODEL_="" methods=(--methods none,random,fastervlm,vispruner --ratios 0.5,0) asked=("$@")
if [ "${SMOL:-0}" = 1 ]; then asked=(--model smol ${1+"$@"}); fi
if _vp_is_smol ${asked[@]+"${asked[@]}"}; then
    MODEL_=smol OUTPUT=$OUTPUT-smol methods=(--methods none,vispruner,random --ratios 0.5)
fi
vispruner_step "what is not in the repository (downloaded once)"
if [ -n "$MODEL_" ]; then _vp_model_env tiny; else vispruner_env tiny && vispruner_tower; fi
_vp_folder "$OUTPUT" OUTPUT
export TOKENIZERS_PARALLELISM=false

if [ -z "${IMAGE:-}" ]; then # a bundled photograph, else the first image of the benchmark
    tiny=$ROOT/playground/tiny
    for IMAGE in "$tiny"/photos/*.jpg "$tiny"/photos/*.png "$tiny"/photos/*.webp "$tiny"/eval/pope/val2014/*; do
        [ ! -f "$IMAGE" ] || break
    done
fi
vispruner_step "patches of $IMAGE kept at 64 of 576 tokens"
vispruner_python llava.analysis.overlay ${MODEL_:+--model "$MODEL_"} --image "$IMAGE" --tokens 64 --output "$OUTPUT/overlay.png" >&2

if [ -n "$MODEL_" ]; then # ten questions, on average, about each of the first 40 images
    vispruner_python llava.tiny.build --benchmarks pope --num-images 40 --output "$OUTPUT/data" >&2
    asked=(--data "$OUTPUT/data" --limit 400 ${asked[@]+"${asked[@]}"})
fi
vispruner_step "bundled POPE at 576, 128, 64 and 32 visual tokens"
vispruner_python llava.eval.sweep --benchmarks pope ${methods[@]+"${methods[@]}"} --tokens 128,64,32 \
    --output "$OUTPUT" ${asked[@]+"${asked[@]}"}
vispruner_step "done; image of the kept patches: $OUTPUT/overlay.png"
