#!/bin/bash
# MME. LLaVA's model_vqa_loader, then the converter and the official scorer that MME's files bring along.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MME=$EVAL_DATA/MME
ask "$MME/llava_mme.jsonl" "$MME/MME_Benchmark_release_version" "$MME/answers/$NAME.jsonl"
if [[ -f $MME/convert_answer_to_mme.py && -f $MME/eval_tool/calculation.py ]]; then
    cd "$MME" && "$PYTHON" convert_answer_to_mme.py --experiment "$NAME"
    cd eval_tool && "$PYTHON" calculation.py --results_dir "answers/$NAME"
else
    echo "No score yet: answers are in $MME/answers/$NAME.jsonl. Put convert_answer_to_mme.py (LLaVA's eval.zip) into $MME"
    echo "and MME's eval_tool beside it, and run this again; the answers are kept."
fi
