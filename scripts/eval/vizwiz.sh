#!/bin/bash
# VizWiz, test. LLaVA's model_vqa_loader and converter; the scores come from the challenge's server.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VIZWIZ=$EVAL_DATA/vizwiz
UPLOAD=$VIZWIZ/answers_upload/$NAME.json
converter convert_vizwiz_for_submission.py
ask "$VIZWIZ/llava_test.jsonl" "$VIZWIZ/test" "$VIZWIZ/answers/$NAME.jsonl"
"$PYTHON" scripts/convert_vizwiz_for_submission.py \
    --annotation-file "$VIZWIZ/llava_test.jsonl" \
    --result-file "$VIZWIZ/answers/$NAME.jsonl" \
    --result-upload-file "$UPLOAD"
echo "No score yet: upload $UPLOAD to the VizWiz challenge on eval.ai."
