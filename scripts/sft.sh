#!/bin/bash
# Stage 3, supervised fine-tuning (SFT): L_LM alone trains the LLM (full or LoRA) and MLP_S. No teacher is loaded.
# Before: dft.sh. The result is a LLaVA checkpoint: evaluate it with llava-compodistill run llava.eval.model_vqa_loader
set -euo pipefail

TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
LORA=${LORA:-0} # 1: LoRA of the language model, with the rank of the authors' release
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
SUFFIX=$([[ $LORA != 1 ]] || echo -lora) # LLaVA's tools know a LoRA checkpoint by its folder's name
DFT=${DFT:-./checkpoints/llava-compodistill-qwen1.5-1.8b-dft$SUFFIX} # with LORA=1 the LoRA folder
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json} # Table 8: LLaVA-mix-665K
IMAGES=${IMAGES:-./playground/data}
OUTPUT=${OUTPUT:-./checkpoints/llava-compodistill-qwen1.5-1.8b$SUFFIX}
PROJECTOR=${PROJECTOR:-taf} # mlp2x_gelu: an ordinary adapter in place of the teacher's (Table 2)
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # Table 8
BATCH=${BATCH:-16}
LR=${LR:-1e-4} # Appendix E.1. Table 8 prints 2e-4, the rate of the authors' LoRA release: LR=2e-4
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
need_model "The checkpoint of the DFT stage" "$DFT" "Run dft.sh (with the same LORA), or set DFT to its output."
need_path "The instruction data" "$DATA" "Set DATA to a JSON file in LLaVA's format."
LORA_FLAGS=()
if [[ $LORA == 1 ]]; then
    LORA_FLAGS=(
        --lora_enable True
        --lora_r "$LORA_R"
        --lora_alpha "$LORA_ALPHA"
    )
fi

launch \
    --stage sft \
    --model_name_or_path "$DFT" \
    --version "$VERSION" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    "${LORA_FLAGS[@]}" \
    --mm_projector_type "$PROJECTOR" \
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
