#!/bin/bash
# VizWiz, test. LLaVA's model_vqa_loader and converter; the scores come from the challenge's server.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
VIZWIZ=$EVAL_DATA/vizwiz
ANSWERS=$VIZWIZ/answers/$NAME.jsonl
UPLOAD=$VIZWIZ/answers_upload/$NAME.json
ask "$VIZWIZ/llava_test.jsonl" "$VIZWIZ/test" "$ANSWERS"
convert vizwiz_for_submission \
    --annotation-file "$VIZWIZ/llava_test.jsonl" \
    --result-file "$ANSWERS" \
    --result-upload-file "$UPLOAD"
echo "No score yet: upload $UPLOAD to the VizWiz challenge on eval.ai." | finish vizwiz "$ANSWERS"
