#!/usr/bin/env bash
# What every evaluation script shares: arguments its users know, settings from the environment, one call.
#
#   source scripts/_eval.sh; vispruner_eval pope "$@"
#   "$@": [TOKENS [RATIO]] [flags of python -m llava.eval.run]; without TOKENS nothing is pruned. --tokens, --ratio and
#   --method among the flags win over what was said before, and name the folder of the answers as well.
#
# Environment variables:
#   CKPT_DIR, CKPT   folder of checkpoints and the name of one in it (CKPT alone: a path; default llava-v1.5-7b)
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval
#   METHOD           pruning method, default vispruner
#   OUT_DIR          where answers and scores go, default outputs/ in the repository
# With none of the first three set, the embedded model and data serve, and the first line of output says so.

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

vispruner_eval() {
    local benchmark=$1 tokens=none ratio="" model="" name=llava-tiny
    shift
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then tokens=$1; shift; fi
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then ratio=$1; shift; fi
    if [ -n "${CKPT_DIR:-}" ]; then
        if [ -z "${CKPT:-}" ] && [ -f "$CKPT_DIR/config.json" ]; then
            model=$CKPT_DIR
        else
            model=${CKPT_DIR%/}/${CKPT:-llava-v1.5-7b}
        fi
    elif [ -n "${CKPT:-}" ]; then
        model=$CKPT
    fi
    local method=${METHOD:-vispruner} setting option flags=()
    while [ $# -gt 0 ]; do
        option=${1%%=*}
        case $option in
            --tokens | --ratio | --method)
                if [ "$1" != "$option" ]; then
                    printf -v "${option#--}" %s "${1#*=}"
                else
                    [ $# -gt 1 ] || _vp_die "$option: a value is missing"
                    printf -v "${option#--}" %s "$2"
                    shift
                fi ;;
            *) flags[${#flags[@]}]=$1 ;;
        esac
        shift
    done
    case $tokens in [Nn][Oo][Nn][Ee] | [Ff][Uu][Ll][Ll] | [Aa][Ll][Ll]) tokens=none method=none ;; esac
    setting=$method
    [ "$method" = none ] || setting=$method-$tokens${ratio:+-$ratio}
    if [ -n "$model" ]; then
        vispruner_env
        name=$(basename "$model")
    else
        vispruner_env tiny
        vispruner_tower
    fi
    set -- --benchmark "$benchmark" --tokens "$tokens" --method "$method" ${ratio:+--ratio "$ratio"} \
        ${model:+--model "$model"} ${DATA_DIR:+--data "${DATA_DIR%/}/$benchmark"} \
        --output "${OUT_DIR:-$ROOT/outputs}/$benchmark/$name/$setting" ${flags[@]+"${flags[@]}"}
    exec "$PY" -m llava.eval.run "$@"
}
