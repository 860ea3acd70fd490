#!/usr/bin/env bash
# From a clean clone to a table: create the environment, download the bundled vision tower, draw the patches of a
# photograph that VisPruner keeps, and evaluate the bundled LLaVA on the bundled POPE with all methods at 576, 128, 64
# and 32 visual tokens. Prints a table and, as the last line of stdout, one JSON document.
#   bash scripts/quickstart.sh [options of python -m llava.eval.sweep]
# Environment: IMAGE (the photograph), OUTPUT (folder for answers and overlay.png), and the variables of scripts/_env.sh.
# shellcheck source-path=SCRIPTDIR source=_env.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_env.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/quickstart.sh" >&2; exit 2; }
OUTPUT=$(_vp_absolute "${OUTPUT:-$ROOT/playground/tiny/results/quickstart}")
if [ -n "${IMAGE:-}" ]; then
    [ -f "$IMAGE" ] || _vp_die "IMAGE=$IMAGE: no such file." "Set IMAGE to an image file, or unset it."
    IMAGE=$(_vp_absolute "$IMAGE")
fi

vispruner_env tiny
vispruner_step "bundled vision tower (downloaded once)"
vispruner_tower
_vp_folder "$OUTPUT" OUTPUT
export TOKENIZERS_PARALLELISM=false

if [ -z "${IMAGE:-}" ]; then # a bundled photograph, else the first image of the benchmark
    tiny=$ROOT/playground/tiny
    for IMAGE in "$tiny"/photos/*.jpg "$tiny"/photos/*.png "$tiny"/photos/*.webp "$tiny"/eval/pope/val2014/*; do
        [ ! -f "$IMAGE" ] || break
    done
fi
vispruner_step "patches of $IMAGE kept at 64 of 576 tokens"
vispruner_python llava.analysis.overlay --image "$IMAGE" --tokens 64 --output "$OUTPUT/overlay.png" >&2

vispruner_step "bundled POPE at 576, 128, 64 and 32 visual tokens"
vispruner_python llava.eval.sweep --benchmarks pope --methods none,random,fastervlm,vispruner --tokens 128,64,32 \
    --ratios 0.5,0 --output "$OUTPUT" "$@"
vispruner_step "done; image of the kept patches: $OUTPUT/overlay.png"
