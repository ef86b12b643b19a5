#!/bin/bash
# Stage 1, distilled pre-training (DPT): L_LM + L_KL train the student's MLP_S; LLM, encoder and P_T stay frozen.
# Before: a teacher (teacher_pretrain.sh, teacher_finetune.sh). Next: dft.sh
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TEACHER=${TEACHER:-./checkpoints/llava-qwen1.5-4b}
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json} # Table 8: LLaVA-1.5-558K
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-./checkpoints/llava-compodistill-qwen1.5-1.8b-dpt}
PROJECTOR=${PROJECTOR:-taf} # mlp2x_gelu: an ordinary adapter in place of the teacher's (Table 2)
GLOBAL_BATCH=${GLOBAL_BATCH:-256} # Table 8
BATCH=${BATCH:-16}
LR=${LR:-1e-3} # Appendix E.1 (Table 8 prints 2e-4: LR=2e-4)
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_model "The teacher" "$TEACHER" "Set TEACHER, or train one with teacher_pretrain.sh and teacher_finetune.sh."
need_path "The captions" "$DATA" "Set DATA to a JSON file in LLaVA's format."

launch \
    --stage dpt \
    --model_name_or_path "$STUDENT" \
    --teacher_model_path "$TEACHER" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --mm_projector_type "$PROJECTOR" \
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
