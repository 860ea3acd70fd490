#!/usr/bin/env bash
# What every evaluation script shares: arguments its users know, settings from the environment, one call.
#
#   source scripts/_eval.sh; vispruner_eval v1_5 pope "$@"
#   "$@": [TOKENS [RATIO]] [flags of python -m llava.eval.run, which win]; without TOKENS nothing is pruned. Under
#   v1_6 TOKENS is per crop: 32 means 160.
#   source scripts/_eval.sh; vispruner_video msvd "$@"
#   "$@": [ANSWERS] [TOKENS [RATIO]] [flags of python -m llava.eval.video]
#
# Environment variables:
#   CKPT_DIR, CKPT   folder of checkpoints and the name of one in it (CKPT alone: a path; default llava-v1.5-7b,
#                    under v1_6 llava-v1.6-vicuna-7b)
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval
#   SPLIT=val        VQAv2 and VizWiz: the validation set, scored here, and not the test set for the server
#   METHOD           pruning method, default vispruner
#   OUT_DIR          where answers and scores go, default outputs/ in the repository
#   CUDA_VISIBLE_DEVICES=0,1,2,3   one process per GPU; VISPRUNER_PROCESSES=N another number
#   JUDGE            video sets: model that judges the answers, at OPENAI_BASE_URL
# With neither checkpoint nor data named, the embedded ones serve, and the first line of output says so.

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# Sets TOKENS_ and RATIO_ from the first arguments, and REST_ to what follows them.
_vp_budget() {
    TOKENS_="" RATIO_="" REST_=()
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then TOKENS_=$1; shift; fi
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then RATIO_=$1; shift; fi
    REST_=(${1+"$@"})
}

# Sets MODEL_ to the checkpoint that the environment names, empty for none.
_vp_checkpoint() { # name in CKPT_DIR by default
    MODEL_=""
    if [ -n "${CKPT_DIR:-}" ]; then
        MODEL_=${CKPT_DIR%/}/${CKPT:-$1}
        if [ -z "${CKPT:-}" ] && [ -f "$CKPT_DIR/config.json" ]; then MODEL_=$CKPT_DIR; fi
    elif [ -n "${CKPT:-}" ]; then
        MODEL_=$CKPT
    fi
}

# How many processes to start: none beside this one where a launcher has started several already.
_vp_processes() {
    local gpus=() count
    case "${WORLD_SIZE:-1} ${OMPI_COMM_WORLD_SIZE:-1} ${SLURM_STEP_NUM_TASKS:-1} $* " in
        "1 1 1 "*--num-chunks*) echo 1 ;;
        "1 1 1 "*)
            IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}" || true
            count=${#gpus[@]}
            echo "${VISPRUNER_PROCESSES:-$((count > 1 ? count : 1))}" ;;
        *) echo 1 ;;
    esac
}

vispruner_eval() { # v1_5 or v1_6, benchmark, arguments
    local version=$1 benchmark=$2 default=llava-v1.5-7b embedded=""
    shift 2
    if [ "$version" = v1_6 ]; then
        default=llava-v1.6-vicuna-7b embedded=$ROOT/playground/tiny/llava-tiny-anyres
    fi
    _vp_budget ${1+"$@"}
    _vp_checkpoint "$default"
    local flags=(--tokens "${TOKENS_:-none}") processes
    case $benchmark in
        vqav2 | vizwiz)
            case ${SPLIT:-${DATA_DIR:+test}} in
                "" | val)
                    [ -n "${DATA_DIR:-}" ] || echo "$benchmark: the embedded set is a validation set, scored here" >&2
                    benchmark=${benchmark}_val ;;
                test*) flags+=(--submit) ;;
                *) _vp_wrong "SPLIT=$SPLIT: val or test" ;;
            esac ;;
        mmbench | mmbench_cn | mmvet) flags+=(--submit) ;;
    esac
    if [ -n "$RATIO_" ]; then flags+=(--ratio "$RATIO_"); fi
    if [ -n "${METHOD:-}" ]; then flags+=(--method "$METHOD"); fi
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$DATA_DIR"); fi
    processes=$(_vp_processes ${REST_[@]+"${REST_[@]}"})
    if [ "$processes" != 1 ]; then flags+=(--processes "$processes"); fi
    if [ -n "$MODEL_" ]; then
        vispruner_env
    else
        vispruner_env tiny
        vispruner_tower
        MODEL_=$embedded
    fi
    exec "$PY" -m llava.eval.run --benchmark "$benchmark" ${MODEL_:+--model "$MODEL_"} "${flags[@]}" \
        --output-dir "${OUT_DIR:-$ROOT/outputs}" ${REST_[@]+"${REST_[@]}"}
}

vispruner_video() { # benchmark, arguments
    local benchmark=$1 flags=()
    shift
    if [ $# -gt 0 ] && [ -e "$1" ]; then flags+=(--answers "$1"); shift; fi
    _vp_budget ${1+"$@"}
    _vp_checkpoint Video-LLaVA-7B
    if [ -n "$TOKENS_" ]; then flags+=(--tokens "$TOKENS_"); fi
    if [ -n "$RATIO_" ]; then flags+=(--ratio "$RATIO_"); fi
    if [ -n "${METHOD:-}" ]; then flags+=(--method "$METHOD"); fi
    if [ -n "${JUDGE:-}" ]; then flags+=(--judge "$JUDGE"); fi
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$DATA_DIR"); fi
    vispruner_env
    exec "$PY" -m llava.eval.video --benchmark "$benchmark" ${MODEL_:+--model "$MODEL_"} \
        --output-dir "${OUT_DIR:-$ROOT/outputs}" ${flags[@]+"${flags[@]}"} ${REST_[@]+"${REST_[@]}"}
}

_vp_wrong() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}
