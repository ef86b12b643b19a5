#!/bin/bash
# Stage 2, distilled fine-tuning (DFT): L_LM + L_KL + L_ADL train the LLM (full or LoRA) and MLP_S.
# Before: dpt.sh. Next: sft.sh. Settings of all stages are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TEACHER=${TEACHER:-./checkpoints/llava-qwen1.5-4b}
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
DPT=${DPT:-./checkpoints/llava-compodistill-$(pair_name "$STUDENT" "$TEACHER")-dpt}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json} # Table 8: LLaVA-mix-665K
IMAGES=${IMAGES:-./playground/data}
LORA=${LORA:-0} # 1: LoRA of the language model, with the rank of the authors' release
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
OUTPUT=${OUTPUT:-./checkpoints/llava-compodistill-$(pair_name "$STUDENT" "$TEACHER")-dft$(lora_suffix)}
PROJECTOR=${PROJECTOR:-taf} # mlp2x_gelu: an ordinary adapter in place of the teacher's (Table 2)
VAT=${VAT:-True} # False: no attention alignment (Table 2)
ATTENTION_STAGES=${ATTENTION_STAGES:-dft} # the stages that train L_ADL, as given to dpt.sh and sft.sh
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # Table 8
BATCH=${BATCH:-4}
LR=${LR:-1e-4} # Appendix E.1. Table 8 prints 2e-4, the rate of the authors' LoRA release: LR=2e-4
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8

need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_checkpoint "The teacher" "$TEACHER" "Set TEACHER, or train one with teacher_pretrain.sh and teacher_finetune.sh."
need_path "The adapter of the DPT stage" "$DPT/mm_projector.bin" \
    "Run dpt.sh with the same STUDENT and TEACHER, or set DPT to its output."
need_data "The instruction data" "$DATA" DATA
lora_flags
attention_flags

train_on_instructions \
    --stage dft \
    --model_name_or_path "$STUDENT" \
    --teacher_model_path "$TEACHER" \
    --pretrain_mm_mlp_adapter "$DPT/mm_projector.bin" \
    --mm_projector_type "$PROJECTOR" \
    --vat "$VAT" \
    "${ATTENTION[@]}" \
    "${LORA_FLAGS[@]}" \
    "$@"
