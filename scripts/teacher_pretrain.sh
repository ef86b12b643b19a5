#!/bin/bash
# The teacher's adapter, by LLaVA's own recipe (LLaVA-1.5, pre-training): an MLP on SigLIP features, LLM frozen.
# Next: teacher_finetune.sh
set -euo pipefail

TEACHER_LLM=${TEACHER_LLM:-Qwen/Qwen1.5-4B}
TOWER=${TOWER:-google/siglip-so400m-patch14-384}
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-./checkpoints/llava-qwen1.5-4b-pretrain}
GLOBAL_BATCH=${GLOBAL_BATCH:-256} # LLaVA-1.5
BATCH=${BATCH:-32}
LR=${LR:-1e-3} # LLaVA-1.5
EPOCHS=${EPOCHS:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
need_model "The teacher's language model" "$TEACHER_LLM" "Set TEACHER_LLM."
need_path "The captions" "$DATA" "Set DATA to a JSON file in LLaVA's format."

launch \
    --stage pt \
    --model_name_or_path "$TEACHER_LLM" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer "${SELECT_LAYER:--2}" \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --output_dir "$OUTPUT" \
    --num_train_epochs "$EPOCHS" \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-24000}" \
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
