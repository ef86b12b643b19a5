#!/bin/bash
# The baseline: the student trained by LLaVA's two steps (PT, SFT) with an ordinary adapter and no teacher, at the
# paper's batch sizes and rates, so that it differs from CompoDistill in the distillation alone.
# An adapter that is there already is used again; flags given to this script go to both steps. ONLY=pretrain stops after
# the first, so that each can be given its own. Settings of all stages are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
PRETRAIN_DATA=${PRETRAIN_DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json} # LLaVA-1.5-558K
PRETRAIN_IMAGES=${PRETRAIN_IMAGES:-./playground/data/LLaVA-Pretrain/images}
PRETRAIN_GLOBAL_BATCH=${PRETRAIN_GLOBAL_BATCH:-256} # Table 8, as DPT
PRETRAIN_BATCH=${PRETRAIN_BATCH:-32}
PRETRAIN_LR=${PRETRAIN_LR:-1e-3} # Appendix E.1, as DPT
PRETRAINED=${PRETRAINED:-./checkpoints/llava-sft-$(name_of "$STUDENT")-pretrain}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json} # Table 8: LLaVA-mix-665K
IMAGES=${IMAGES:-./playground/data}
LORA=${LORA:-0} # 1: LoRA of the language model, with the rank of the authors' release
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
OUTPUT=${OUTPUT:-./checkpoints/llava-sft-$(name_of "$STUDENT")$(lora_suffix)}
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # Table 8, as SFT
BATCH=${BATCH:-16}
LR=${LR:-1e-4} # Appendix E.1, as SFT (LLaVA-1.5 itself uses 2e-5)
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8
ONLY=${ONLY:-}

need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_data "The captions" "$PRETRAIN_DATA" PRETRAIN_DATA
need_data "The instruction data" "$DATA" DATA
lora_flags

if [[ -f $PRETRAINED/mm_projector.bin ]]; then
    echo "${0##*/}: using the adapter in $PRETRAINED (remove it to train it again)" >&2
else
    DATA=$PRETRAIN_DATA IMAGES=$PRETRAIN_IMAGES OUTPUT=$PRETRAINED LR=$PRETRAIN_LR \
        GLOBAL_BATCH=$PRETRAIN_GLOBAL_BATCH BATCH=$PRETRAIN_BATCH ACCUM=${PRETRAIN_ACCUM:-} train_on_captions \
        --stage pt \
        --model_name_or_path "$STUDENT" \
        --mm_projector_type mlp2x_gelu \
        "$@"
fi
[[ $ONLY != pretrain ]] || exit 0

train_on_instructions \
    --stage sft \
    --model_name_or_path "$STUDENT" \
    --pretrain_mm_mlp_adapter "$PRETRAINED/mm_projector.bin" \
    --mm_projector_type mlp2x_gelu \
    "${LORA_FLAGS[@]}" \
    "$@"
