#!/bin/bash
# POPE: object hallucination, yes/no. LLaVA's model_vqa_loader and eval_pope.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
POPE=$EVAL_DATA/pope
ANSWERS=$POPE/answers/$NAME.jsonl
need "$POPE/coco" "the annotations, $EVALUATION_MD"
ask "$POPE/llava_pope_test.jsonl" "$POPE/val2014" "$ANSWERS"
scored "$PYTHON" -m llava.eval.eval_pope \
    --annotation-dir "$POPE/coco" \
    --question-file "$POPE/llava_pope_test.jsonl" \
    --result-file "$ANSWERS" | finish pope "$ANSWERS"
