#!/bin/bash
# VQAv2, test-dev. LLaVA's model_vqa_loader and converter; the scores come from the challenge's server.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT=llava_vqav2_mscoco_test-dev2015
VQAV2=$EVAL_DATA/vqav2
converter convert_vqav2_for_submission.py
mkdir -p "$VQAV2/answers/$SPLIT/$NAME"
ask "$VQAV2/$SPLIT.jsonl" "$VQAV2/test2015" "$VQAV2/answers/$SPLIT/$NAME/merge.jsonl"
"$PYTHON" scripts/convert_vqav2_for_submission.py --dir "$VQAV2" --split "$SPLIT" --ckpt "$NAME"
echo "No score yet: upload $VQAV2/answers_upload/$SPLIT/$NAME.json to the VQA challenge on eval.ai."
