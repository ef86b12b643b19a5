#!/bin/bash
# VQAv2, test-dev. LLaVA's model_vqa_loader and converter; the scores come from the challenge's server.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
SPLIT=llava_vqav2_mscoco_test-dev2015
VQAV2=$EVAL_DATA/vqav2
ANSWERS=$VQAV2/answers/$SPLIT/$NAME/merge.jsonl
UPLOAD=$VQAV2/answers_upload/$SPLIT/$NAME.json
need "$VQAV2/llava_vqav2_mscoco_test2015.jsonl" "$EVALUATION_MD"
ask "$VQAV2/$SPLIT.jsonl" "$VQAV2/test2015" "$ANSWERS"
convert vqav2_for_submission --dir "$VQAV2" --split "$SPLIT" --ckpt "$NAME"
echo "No score yet: upload $UPLOAD to the VQA challenge on eval.ai." | finish vqav2 "$ANSWERS"
