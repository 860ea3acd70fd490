#!/usr/bin/env bash
# Measure smol, or another bundled model, on new development images: POPE at several budgets with all tokens, VisPruner
# and random tokens; then descriptions, colors and objects in words, plain questions and perplexity. Prints tables and,
# as the last line of stdout, one JSON document {"pope": ..., "words": ...}.
#   bash scripts/smol/measure.sh [--model NAME] [--num-images N] [--seed S] [--output DIR]
#   --model       checkpoint folder or bundled name (default: smol)
#   --num-images  images (default: 100); of POPE, 18 questions each
#   --seed        seed of the first image (default: 1500000000); development images begin there
#   --output      folder for images, answers and scores (default: outputs/smol/measured in the repository)
# Environment: TOKENS (budgets besides 576; default: 128,64,32), LIMIT (questions of POPE; default: all). Rerunning
# resumes an interrupted run.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/smol/measure.sh" >&2; exit 2; }

MODEL_=smol number=100 seed=1500000000 output=$ROOT/outputs/smol/measured
while [ $# -gt 0 ]; do
    case $1 in --model=* | --num-images=* | --seed=* | --output=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        --model | --num-images | --seed | --output) [ $# -gt 1 ] || _vp_wrong "$1: a value is missing." ;;
        *) _vp_wrong "$1: unknown option. Choose from --model, --num-images, --seed, --output." ;;
    esac
    case $1 in --model) MODEL_=$2 ;; --num-images) number=$2 ;; --seed) seed=$2 ;; --output) output=$2 ;; esac
    shift 2
done
output=$(_vp_absolute "$output")
_vp_model_env "tiny"
_vp_folder "$output" --output
data=$output/data-$seed-$number
# SHA256SUMS is written last.
if [ ! -f "$data/SHA256SUMS" ]; then
    vispruner_step "$number development images from seed $seed on"
    vispruner_python llava.tiny.build --benchmarks pope --seed "$seed" --num-images "$number" --output "$data" >&2 || exit $?
fi
vispruner_step "POPE at 576 and ${TOKENS:=128,64,32} tokens"
vispruner_python llava.eval.sweep --model "$MODEL_" --benchmarks pope --data "$data" --methods none,vispruner,random \
    --tokens "$TOKENS" --ratios 0.5 ${LIMIT:+--limit "$LIMIT"} --output "$output/pope-$seed-$number" | tee "$output/pope.log" || exit $?
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
vispruner_step "descriptions, short answers, plain questions, perplexity"
words=$(vispruner_python llava.tiny.measure --model "$MODEL_" --seed "$seed" --num-images "$number" --output "$output/words.json") || exit $?
printf '{"pope": %s, "words": %s}\n' "$(tail -n 1 "$output/pope.log")" "$(printf '%s\n' "$words" | tail -n 1)" | tee "$output/measured.json"
