#!/bin/bash
# Stage 1, distilled pre-training (DPT): L_LM + L_KL train the student's MLP_S; LLM, encoder and P_T stay frozen.
# Before: a teacher (teacher_pretrain.sh, teacher_finetune.sh). Next: dft.sh. Settings of all stages are listed in
# launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TEACHER=${TEACHER:-./checkpoints/llava-qwen1.5-4b}
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json} # Table 8: LLaVA-1.5-558K
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-./checkpoints/llava-compodistill-$(pair_name "$STUDENT" "$TEACHER")-dpt}
PROJECTOR=${PROJECTOR:-taf} # mlp2x_gelu: an ordinary adapter in place of the teacher's (Table 2)
ATTENTION_STAGES=${ATTENTION_STAGES:-dft} # the stages that train L_ADL: dpt,dft has it here, too
GLOBAL_BATCH=${GLOBAL_BATCH:-256} # Table 8
BATCH=${BATCH:-16}
LR=${LR:-1e-3} # Appendix E.1 (Table 8 prints 2e-4: LR=2e-4)
EPOCHS=${EPOCHS:-1} # Table 8
MAX_LENGTH=${MAX_LENGTH:-2048} # Table 8

need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_checkpoint "The teacher" "$TEACHER" "Set TEACHER, or train one with teacher_pretrain.sh and teacher_finetune.sh."
need_data "The captions" "$DATA" DATA
attention_flags

train_on_captions \
    --stage dpt \
    --model_name_or_path "$STUDENT" \
    --teacher_model_path "$TEACHER" \
    --mm_projector_type "$PROJECTOR" \
    "${ATTENTION[@]}" \
    "$@"
