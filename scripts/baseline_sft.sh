#!/bin/bash
# The baseline: the student trained by LLaVA's two steps (PT, SFT) with an ordinary adapter and no teacher, at the
# paper's batch sizes and rates, so that it differs from CompoDistill in the distillation alone.
# An adapter that is there already is used again; flags given to this script go to both steps. ONLY=pretrain stops after
# the first, so that each can be given its own.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
PRETRAIN_DATA=${PRETRAIN_DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json} # LLaVA-1.5-558K
PRETRAIN_IMAGES=${PRETRAIN_IMAGES:-./playground/data/LLaVA-Pretrain/images}
PRETRAIN_GLOBAL_BATCH=${PRETRAIN_GLOBAL_BATCH:-256} # Table 8, as DPT
PRETRAIN_BATCH=${PRETRAIN_BATCH:-32}
PRETRAIN_LR=${PRETRAIN_LR:-1e-3} # Appendix E.1, as DPT
PRETRAINED=${PRETRAINED:-./checkpoints/llava-sft-qwen1.5-1.8b-pretrain}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json} # Table 8: LLaVA-mix-665K
IMAGES=${IMAGES:-./playground/data}
LORA=${LORA:-0} # 1: LoRA of the language model, with the rank of the authors' release
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
SUFFIX=$([[ $LORA != 1 ]] || echo -lora) # LLaVA's tools know a LoRA checkpoint by its folder's name
OUTPUT=${OUTPUT:-./checkpoints/llava-sft-qwen1.5-1.8b$SUFFIX}
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # Table 8, as SFT
BATCH=${BATCH:-16}
LR=${LR:-1e-4} # Appendix E.1, as SFT (LLaVA-1.5 itself uses 2e-5)
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8
ONLY=${ONLY:-}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_path "The captions" "$PRETRAIN_DATA" "Set PRETRAIN_DATA to a JSON file in LLaVA's format."
need_path "The instruction data" "$DATA" "Set DATA to a JSON file in LLaVA's format."
LORA_FLAGS=()
if [[ $LORA == 1 ]]; then
    LORA_FLAGS=(
        --lora_enable True
        --lora_r "$LORA_R"
        --lora_alpha "$LORA_ALPHA"
    )
fi

if [[ -f $PRETRAINED/mm_projector.bin ]]; then
    echo "${0##*/}: using the adapter in $PRETRAINED (remove it to train it again)" >&2
else
    GLOBAL_BATCH=$PRETRAIN_GLOBAL_BATCH BATCH=$PRETRAIN_BATCH ACCUM=${PRETRAIN_ACCUM:-} launch \
        --stage pt \
        --model_name_or_path "$STUDENT" \
        --version plain \
        --data_path "$PRETRAIN_DATA" \
        --image_folder "$PRETRAIN_IMAGES" \
        --vision_tower "$TOWER" \
        --mm_projector_type mlp2x_gelu \
        --mm_vision_select_layer "${SELECT_LAYER:--2}" \
        --mm_use_im_start_end False \
        --mm_use_im_patch_token False \
        --output_dir "$PRETRAINED" \
        --num_train_epochs "$EPOCHS" \
        --save_strategy steps \
        --save_steps "${SAVE_STEPS:-24000}" \
        --save_total_limit 1 \
        --learning_rate "$PRETRAIN_LR" \
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
fi
[[ $ONLY != pretrain ]] || exit 0

launch \
    --stage sft \
    --model_name_or_path "$STUDENT" \
    --version "$VERSION" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$TOWER" \
    --pretrain_mm_mlp_adapter "$PRETRAINED/mm_projector.bin" \
    "${LORA_FLAGS[@]}" \
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
