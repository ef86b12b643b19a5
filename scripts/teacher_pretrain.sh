#!/bin/bash
# The teacher's adapter, by LLaVA's own recipe (LLaVA-1.5, pre-training): an MLP on SigLIP features, LLM frozen.
# Next: teacher_finetune.sh. Settings of all stages (launcher, precision, checkpoints …) are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TEACHER_LLM=${TEACHER_LLM:-Qwen/Qwen1.5-4B}
TOWER=${TOWER:-google/siglip-so400m-patch14-384}
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-./checkpoints/llava-$(name_of "$TEACHER_LLM")-pretrain}
GLOBAL_BATCH=${GLOBAL_BATCH:-256} # LLaVA-1.5
BATCH=${BATCH:-32}
LR=${LR:-1e-3} # LLaVA-1.5
EPOCHS=${EPOCHS:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}

need_model "The teacher's language model" "$TEACHER_LLM" "Set TEACHER_LLM."
need_data "The captions" "$DATA" DATA

train_on_captions \
    --stage pt \
    --model_name_or_path "$TEACHER_LLM" \
    --mm_projector_type mlp2x_gelu \
    "$@"
