#!/bin/bash
# GQA, testdev-balanced. LLaVA's model_vqa_loader and converter, then the official scorer where it has been put.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT=llava_gqa_testdev_balanced
GQA=$EVAL_DATA/gqa
ANSWERS=$GQA/answers/$SPLIT/$NAME/merge.jsonl
PREDICTIONS=$GQA/data/testdev_balanced_predictions.json
converter convert_gqa_for_eval.py
mkdir -p "$(dirname "$ANSWERS")"
ask "$GQA/$SPLIT.jsonl" "$GQA/data/images" "$ANSWERS"
"$PYTHON" scripts/convert_gqa_for_eval.py --src "$ANSWERS" --dst "$PREDICTIONS"
if [[ -f $GQA/data/eval/eval.py || -f $GQA/data/eval.py ]]; then
    SCORER=eval.py
    [[ -f $GQA/data/eval.py ]] || SCORER=eval/eval.py
    cd "$GQA/data" && "$PYTHON" "$SCORER" --tier testdev_balanced
else
    echo "No score yet: predictions are in $PREDICTIONS. Put GQA's official eval.py (cs.stanford.edu/people/dorarad/gqa)"
    echo "and its questions into $GQA/data and run this again; the answers are kept."
fi
