#!/bin/bash
# GQA, testdev-balanced. LLaVA's model_vqa_loader and converter, then the official scorer where it has been put.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
SPLIT=llava_gqa_testdev_balanced
GQA=$EVAL_DATA/gqa
ANSWERS=$GQA/answers/$SPLIT/$NAME/merge.jsonl
ask "$GQA/$SPLIT.jsonl" "$GQA/data/images" "$ANSWERS"
convert gqa_for_eval --src "$ANSWERS" --dst "$GQA/data/testdev_balanced_predictions.json"
score() {
    if [[ -f $GQA/data/eval/eval.py ]]; then
        (cd "$GQA/data" && scored "$PYTHON" eval/eval.py --tier testdev_balanced)
    elif [[ -f $GQA/data/eval.py ]]; then
        (cd "$GQA/data" && scored "$PYTHON" eval.py --tier testdev_balanced)
    else
        echo "GQA's official eval.py (cs.stanford.edu/people/dorarad/gqa) is not in $GQA/data."
    fi
}
score | finish gqa "$ANSWERS"
