#!/bin/bash
# The teacher, by LLaVA's own recipe (LLaVA-1.5, visual instruction tuning): the whole LLM and the adapter.
# Before: teacher_pretrain.sh. Next: dpt.sh
set -euo pipefail

TEACHER_LLM=${TEACHER_LLM:-Qwen/Qwen1.5-4B}
PRETRAINED=${PRETRAINED:-./checkpoints/llava-qwen1.5-4b-pretrain}
TOWER=${TOWER:-google/siglip-so400m-patch14-384}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-./playground/data}
OUTPUT=${OUTPUT:-./checkpoints/llava-qwen1.5-4b}
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # LLaVA-1.5
BATCH=${BATCH:-16}
LR=${LR:-2e-5} # LLaVA-1.5
EPOCHS=${EPOCHS:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
need_model "The teacher's language model" "$TEACHER_LLM" "Set TEACHER_LLM."
ADAPTER=()
if [[ $PRETRAINED != none ]]; then # none: TEACHER_LLM is a LLaVA checkpoint that goes on with its own adapter
    need_path "The pre-trained adapter" "$PRETRAINED/mm_projector.bin" "Run teacher_pretrain.sh, or set PRETRAINED to its output."
    ADAPTER=(--pretrain_mm_mlp_adapter "$PRETRAINED/mm_projector.bin")
fi
need_path "The instruction data" "$DATA" "Set DATA to a JSON file in LLaVA's format."

launch \
    --stage sft \
    --model_name_or_path "$TEACHER_LLM" \
    --version "$VERSION" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    "${ADAPTER[@]}" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer "${SELECT_LAYER:--2}" \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio "${ASPECT_RATIO:-pad}" \
    --group_by_modality_length True \
    --output_dir "$OUTPUT" \
    --num_train_epochs "$EPOCHS" \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-50000}" \
    --save_total_limit 1 \
    --learning_rate "$LR" \
    --weight_decay 0. \
    --warmup_ratio "${WARMUP_RATIO:-0.03}" \
    --lr_scheduler_type cosine \
    --logging_steps "${LOGGING_STEPS:-1}" \
    --model_max_length "$MAX_LENGTH" \
    --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}" \
    --dataloader_num_workers "${WORKERS:-4}" \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-none}" \
    "$@"
