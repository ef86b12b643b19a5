#!/bin/bash
# The teacher, by LLaVA's own recipe (LLaVA-1.5, visual instruction tuning): the whole LLM and the adapter.
# Before: teacher_pretrain.sh. Next: dpt.sh. Settings of all stages are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TEACHER_LLM=${TEACHER_LLM:-Qwen/Qwen1.5-4B}
PRETRAINED=${PRETRAINED:-./checkpoints/llava-$(name_of "$TEACHER_LLM")-pretrain}
TOWER=${TOWER:-google/siglip-so400m-patch14-384}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-./playground/data}
OUTPUT=${OUTPUT:-./checkpoints/llava-$(name_of "$TEACHER_LLM")}
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # LLaVA-1.5
BATCH=${BATCH:-16}
LR=${LR:-2e-5} # LLaVA-1.5
EPOCHS=${EPOCHS:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}

need_model "The teacher's language model" "$TEACHER_LLM" "Set TEACHER_LLM."
ADAPTER=()
if [[ $PRETRAINED != none ]]; then # none: TEACHER_LLM is a LLaVA checkpoint that goes on with its own adapter
    need_path "The pre-trained adapter" "$PRETRAINED/mm_projector.bin" \
        "Run teacher_pretrain.sh with the same TEACHER_LLM, or set PRETRAINED to its output."
    ADAPTER=(--pretrain_mm_mlp_adapter "$PRETRAINED/mm_projector.bin")
fi
need_data "The instruction data" "$DATA" DATA

train_on_instructions \
    --stage sft \
    --model_name_or_path "$TEACHER_LLM" \
    --mm_projector_type mlp2x_gelu \
    "${ADAPTER[@]}" \
    "$@"
