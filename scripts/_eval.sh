#!/usr/bin/env bash
# Shared by all evaluation scripts: positional arguments, settings from the environment, one Python command.
#
#   source scripts/_eval.sh; vispruner_eval v1_5 pope "$@"
#   "$@": [TOKENS [RATIO]] [options of python -m llava.eval.run, which take precedence]; without TOKENS, no
#   pruning. In v1_6, TOKENS is per crop: 32 means 160.
#   source scripts/_eval.sh; vispruner_video msvd "$@"
#   "$@": [ANSWERS] [TOKENS [RATIO]] [options of python -m llava.eval.video]; TOKENS is of a whole clip. ANSWERS, made
#   elsewhere, are scored; without them, the model is asked.
#
# Environment variables:
#   CKPT_DIR, CKPT   folder of checkpoints and the name of one of them (default: llava-v1.5-7b, in v1_6
#                    llava-v1.6-vicuna-7b); CKPT without CKPT_DIR is a path, or smol (docs/smol.md)
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval
#   SPLIT=val        VQAv2 and VizWiz: the validation set, scored locally (default: the test set, for the server)
#   METHOD           pruning method (default: vispruner)
#   OUT_DIR          folder for answers and scores (default: outputs/ in the repository)
#   VISPRUNER_PRESET published or exact, see docs/reproduce.md (default: published for your own checkpoints)
#   CUDA_VISIBLE_DEVICES=0,1,2,3   one process per GPU; VISPRUNER_PROCESSES=N sets another number
#   JUDGE            video benchmarks: model that judges the answers, at OPENAI_BASE_URL
# Relative paths are relative to the caller's folder. Without checkpoint and data, the bundled ones are used, and the first line of output says so.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

# Sets TOKENS_ and RATIO_ from the first arguments, and EXTRA_ARGS_ to the remaining ones.
_vp_budget() {
    TOKENS_="" RATIO_="" EXTRA_ARGS_=()
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then TOKENS_=$1; shift; fi
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then RATIO_=$1; shift; fi
    EXTRA_ARGS_=(${1+"$@"})
}

# A path that starts with a dash is not an option.
_vp_path() { case $1 in -*) printf './%s\n' "$1" ;; *) printf '%s\n' "$1" ;; esac; }

# Sets MODEL_ to the checkpoint of the environment, or to nothing.
_vp_checkpoint() { # default name in CKPT_DIR
    MODEL_=""
    if [ -n "${CKPT_DIR:-}" ]; then
        MODEL_=${CKPT_DIR%/}/${CKPT:-$1}
        if [ -z "${CKPT:-}" ] && [ -f "$CKPT_DIR/config.json" ]; then MODEL_=$CKPT_DIR; fi
    elif [ -n "${CKPT:-}" ]; then
        MODEL_=$CKPT
    fi
    MODEL_=$(_vp_path "$MODEL_")
}

# Whether the model is the bundled smol, which needs more than is in the repository. $@: arguments of the command.
_vp_is_smol() {
    case " $* " in *" --model smol "* | *" --model=smol "*) return 0 ;; esac
    [ "$MODEL_" = smol ] && [ ! -e smol ] || [ "$MODEL_" -ef "$ROOT/playground/tiny/smol" ]
}

# Your own checkpoints run as the published numbers were measured; the bundled models keep exact pixels.
_vp_published() {
    local name
    for name in llava-tiny llava-tiny-anyres smol; do
        if [ "$MODEL_" = "$name" ] && [ ! -e "$name" ] || [ "$MODEL_" -ef "$ROOT/playground/tiny/$name" ]; then return; fi
    done
    export VISPRUNER_PRESET=${VISPRUNER_PRESET:-published}
}

# Prepares the environment for MODEL_, nothing being the bundled model, and fetches what is not in the repository.
_vp_model_env() { # "extra ..." of the script, arguments of the command
    local extras=()
    read -r -a extras <<<"$1" || true
    shift
    if _vp_is_smol ${1+"$@"}; then
        vispruner_env ${extras[@]+"${extras[@]}"} smol
        vispruner_smol
    elif [ -n "$MODEL_" ]; then
        vispruner_env ${extras[@]+"${extras[@]}"}
    else
        vispruner_env ${extras[@]+"${extras[@]}"} tiny
        vispruner_tower
    fi
}

# Number of processes to start: one if a launcher has already started several.
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
    local version=$1 benchmark=$2 default=llava-v1.5-7b bundled=""
    shift 2
    if [ "$version" = v1_6 ]; then
        default=llava-v1.6-vicuna-7b bundled=$ROOT/playground/tiny/llava-tiny-anyres
    fi
    _vp_budget ${1+"$@"}
    _vp_checkpoint "$default"
    local flags=(--tokens "${TOKENS_:-none}") processes
    case $benchmark in
        vqav2 | vizwiz)
            case ${SPLIT:-${DATA_DIR:+test}} in
                "" | val)
                    [ -n "${DATA_DIR:-}" ] || echo "$benchmark: the bundled benchmark is a validation set, which is scored locally" >&2
                    benchmark=${benchmark}_val ;;
                test*) flags+=(--submit) ;;
                *) _vp_wrong "SPLIT=$SPLIT: unknown split. Choose from val, test." ;;
            esac ;;
        mmbench | mmbench_cn | mmvet) flags+=(--submit) ;;
    esac
    if [ -n "$RATIO_" ]; then flags+=(--ratio "$RATIO_"); fi
    if [ -n "${METHOD:-}" ]; then flags+=(--method "$METHOD"); fi
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$(_vp_path "$DATA_DIR")"); fi
    processes=$(_vp_processes ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"})
    if [ "$processes" != 1 ]; then flags+=(--processes "$processes"); fi
    if [ -n "$MODEL_" ]; then _vp_published; fi
    _vp_model_env "" ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
    MODEL_=${MODEL_:-$bundled}
    exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.run --benchmark "$benchmark" ${MODEL_:+--model "$MODEL_"} ${flags[@]+"${flags[@]}"} \
        --output-dir "$(_vp_path "${OUT_DIR:-$ROOT/outputs}")" ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
}

vispruner_video() { # benchmark, arguments
    local benchmark=$1 flags=() answers="" processes
    shift
    case ${1:-} in
        -*) ;;
        */* | *.json | *.jsonl) answers=$1 ;; # also if it is missing: the command says so
        *) if [ -e "${1:-}" ]; then answers=$1; fi ;;
    esac
    if [ -n "$answers" ]; then flags+=(--answers "$(_vp_path "$answers")"); shift; fi
    _vp_budget ${1+"$@"}
    _vp_checkpoint Video-LLaVA-7B
    if [ -n "$TOKENS_" ]; then flags+=(--tokens "$TOKENS_"); fi
    if [ -n "$RATIO_" ]; then flags+=(--ratio "$RATIO_"); fi
    if [ -n "${METHOD:-}" ]; then flags+=(--method "$METHOD"); fi
    if [ -n "${JUDGE:-}" ]; then flags+=(--judge "$JUDGE"); fi
    if [ -n "${DATA_DIR:-}" ]; then flags+=(--data "$(_vp_path "$DATA_DIR")"); fi
    processes=$(_vp_processes ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"})
    if [ "$processes" != 1 ] && [ -z "$answers" ]; then flags+=(--processes "$processes"); fi
    if [ -n "$answers" ]; then
        vispruner_env
    elif [ -n "$MODEL_" ]; then
        vispruner_env video
    elif [ -d "${OUT_DIR:-$ROOT/outputs}/$benchmark/Video-LLaVA-7B" ]; then # answers made elsewhere
        vispruner_env video
    else
        vispruner_env video tiny
        vispruner_python llava.tiny.video_tower >/dev/null
    fi
    exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.video --benchmark "$benchmark" ${MODEL_:+--model "$MODEL_"} \
        --output-dir "$(_vp_path "${OUT_DIR:-$ROOT/outputs}")" ${flags[@]+"${flags[@]}"} ${EXTRA_ARGS_[@]+"${EXTRA_ARGS_[@]}"}
}

_vp_wrong() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}
