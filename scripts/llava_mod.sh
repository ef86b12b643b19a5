#!/bin/bash
# The rival LLaVA-MoD (arXiv 2408.15881), all four steps: the adapter (pt), dense to dense (d2d), dense to sparse (d2s)
# and preferences. A step whose output is there is not run again; flags given to this script go to all steps, and
# STAGES="d2s preference" runs those alone. The paper trains on other data than LLaVA's: set D2D_DATA, D2S_DATA and
# PREFERENCE_DATA. Settings of all stages are listed in launch.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen1.5-1.8B} # or Qwen/Qwen1.5-0.5B
TEACHER=${TEACHER:-./checkpoints/llava-qwen1.5-4b}
TOWER=${TOWER:-google/siglip-so400m-patch14-384} # 729 visual tokens; the paper's is CLIP-L at 336 pixels
PRETRAIN_DATA=${PRETRAIN_DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json} # LLaVA-1.5-558K
PRETRAIN_IMAGES=${PRETRAIN_IMAGES:-./playground/data/LLaVA-Pretrain/images}
PRETRAIN_BATCH=${PRETRAIN_BATCH:-32}
PRETRAIN_LR=${PRETRAIN_LR:-1e-3}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
D2D_DATA=${D2D_DATA:-$DATA} # the paper: 2.4M captions and conversations
D2S_DATA=${D2S_DATA:-$DATA} # the paper: 1.4M of several tasks
PREFERENCE_DATA=${PREFERENCE_DATA:-./playground/data/preferences.json} # the paper: 80k pairs of RLAIF-V
IMAGES=${IMAGES:-./playground/data}
ROOT=${ROOT:-./checkpoints/llava-mod-$(pair_name "$STUDENT" "$TEACHER")} # a step's folder is $ROOT-STEP
VERSION=${VERSION:-qwen_1_5} # conversation template; v1 for Vicuna and MobileLLaMA
BATCH=${BATCH:-4}
PRETRAIN_GLOBAL_BATCH=${PRETRAIN_GLOBAL_BATCH:-256}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
LR=${LR:-2e-5} # of d2d and d2s
PREFERENCE_LR=${PREFERENCE_LR:-2e-6}
EPOCHS=${EPOCHS:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}
STAGES=${STAGES:-pt d2d d2s preference}

wanted() {
    [[ " $STAGES " == *" $1 "* ]] || return 1
    [[ $DRY_RUN != 1 && -f $ROOT-$1/config.json ]] || return 0
    echo "${0##*/}: using $ROOT-$1 (remove it to train it again)" >&2
    return 1
}

need_model "The student's language model" "$STUDENT" "Set STUDENT."
need_checkpoint "The teacher" "$TEACHER" "Set TEACHER, or train one with teacher_pretrain.sh and teacher_finetune.sh."
for stage in $STAGES; do
    case $stage in
        pt) need_data "The captions" "$PRETRAIN_DATA" PRETRAIN_DATA ;;
        d2d) need_data "The data of d2d" "$D2D_DATA" D2D_DATA ;;
        d2s) need_data "The data of d2s" "$D2S_DATA" D2S_DATA ;;
        preference) need_data "The pairs of answers" "$PREFERENCE_DATA" PREFERENCE_DATA ;;
        *) fail "STAGES: $stage must be one of pt, d2d, d2s, preference." ;;
    esac
done

[[ $STAGES == *pt* || $STAGES != *d2d* ]] ||
    need_path "The adapter of the pt step" "$ROOT-pt/mm_projector.bin" "Run STAGES=\"pt $STAGES\", or set ROOT."
[[ $STAGES == *d2d* || $STAGES != *d2s* ]] ||
    need_path "The student of the d2d step" "$ROOT-d2d/config.json" "Run STAGES=\"d2d $STAGES\", or set ROOT."
[[ $STAGES == *d2s* || $STAGES != *preference* ]] ||
    need_path "The student of the d2s step" "$ROOT-d2s/config.json" "Run STAGES=\"d2s $STAGES\", or set ROOT."

METHOD=(--method llava_mod --mm_projector_type mlp2x_gelu)
DISTILLED=("${METHOD[@]}" --teacher_model_path "$TEACHER")

if wanted pt; then
    DATA=$PRETRAIN_DATA IMAGES=$PRETRAIN_IMAGES OUTPUT=$ROOT-pt LR=$PRETRAIN_LR BATCH=$PRETRAIN_BATCH \
        GLOBAL_BATCH=$PRETRAIN_GLOBAL_BATCH train_on_captions \
        --stage pt --model_name_or_path "$STUDENT" "${METHOD[@]}" "$@"
fi
if wanted d2d; then
    DATA=$D2D_DATA OUTPUT=$ROOT-d2d train_on_instructions \
        --stage d2d --model_name_or_path "$STUDENT" --pretrain_mm_mlp_adapter "$ROOT-pt/mm_projector.bin" \
        "${DISTILLED[@]}" "$@"
fi
if wanted d2s; then
    DATA=$D2S_DATA OUTPUT=$ROOT-d2s train_on_instructions \
        --stage d2s --model_name_or_path "$ROOT-d2d" "${DISTILLED[@]}" "$@"
fi
if wanted preference; then
    DATA=$PREFERENCE_DATA OUTPUT=$ROOT-preference LR=$PREFERENCE_LR train_on_instructions \
        --stage preference --model_name_or_path "$ROOT-d2s" "${DISTILLED[@]}" "$@"
fi
