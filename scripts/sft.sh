#!/bin/bash
# Stage 3, supervised fine-tuning (SFT): L_LM alone trains the LLM (full or LoRA) and MLP_S. No teacher is loaded, unless
# ATTENTION_STAGES names sft. Before: dft.sh. The result is a LLaVA checkpoint: evaluate it with llava-compodistill eval.
# Settings of all stages are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # as given to dft.sh: STUDENT and TEACHER name the folders
TEACHER=${TEACHER:-./checkpoints/llava-qwen1.5-4b}
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
LORA=${LORA:-0} # 1: LoRA of the language model, with the rank of the authors' release
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
DFT=${DFT:-./checkpoints/llava-compodistill-$(pair_name "$STUDENT" "$TEACHER")-dft$(lora_suffix)}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json} # Table 8: LLaVA-mix-665K
IMAGES=${IMAGES:-./playground/data}
OUTPUT=${OUTPUT:-./checkpoints/llava-compodistill-$(pair_name "$STUDENT" "$TEACHER")$(lora_suffix)}
PROJECTOR=${PROJECTOR:-taf} # mlp2x_gelu: an ordinary adapter in place of the teacher's (Table 2)
ATTENTION_STAGES=${ATTENTION_STAGES:-dft} # the stages that train L_ADL: dft,sft has it here, too, and loads TEACHER
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
GLOBAL_BATCH=${GLOBAL_BATCH:-128} # Table 8
BATCH=${BATCH:-16}
LR=${LR:-1e-4} # Appendix E.1. Table 8 prints 2e-4, the rate of the authors' LoRA release: LR=2e-4
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8

need_checkpoint "The checkpoint of the DFT stage" "$DFT" \
    "Run dft.sh with the same STUDENT, TEACHER and LORA, or set DFT to its output."
need_data "The instruction data" "$DATA" DATA
lora_flags
attention_flags
if [[ ,${ATTENTION_STAGES// /}, == *,sft,* ]]; then
    need_checkpoint "The teacher" "$TEACHER" "Set TEACHER, or leave sft out of ATTENTION_STAGES."
    ATTENTION+=(--teacher_model_path "$TEACHER")
fi

train_on_instructions \
    --stage sft \
    --model_name_or_path "$DFT" \
    --mm_projector_type "$PROJECTOR" \
    "${ATTENTION[@]}" \
    "${LORA_FLAGS[@]}" \
    "$@"
