#!/bin/bash
# TextVQA, validation. LLaVA's model_vqa_loader and eval_textvqa.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
TEXTVQA=$EVAL_DATA/textvqa
ANSWERS=$TEXTVQA/answers/$NAME.jsonl
need "$TEXTVQA/TextVQA_0.5.1_val.json" "$EVALUATION_MD"
ask "$TEXTVQA/llava_textvqa_val_v051_ocr.jsonl" "$TEXTVQA/train_images" "$ANSWERS"
scored "$PYTHON" -m llava.eval.eval_textvqa \
    --annotation-file "$TEXTVQA/TextVQA_0.5.1_val.json" \
    --result-file "$ANSWERS" | finish textvqa "$ANSWERS"
