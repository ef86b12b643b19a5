#!/bin/bash
# MME. LLaVA's model_vqa_loader, then the converter and the official scorer where they have been put.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

no_flags "$@"
MME=$EVAL_DATA/MME
ANSWERS=$MME/answers/$NAME.jsonl
ask "$MME/llava_mme.jsonl" "$MME/MME_Benchmark_release_version" "$ANSWERS"
score() {
    if [[ -f $MME/convert_answer_to_mme.py && -f $MME/eval_tool/calculation.py ]]; then
        (cd "$MME" && scored "$PYTHON" convert_answer_to_mme.py --experiment "$NAME")
        (cd "$MME/eval_tool" && scored "$PYTHON" calculation.py --results_dir "answers/$NAME")
    else
        echo "MME's official eval_tool and LLaVA's convert_answer_to_mme.py (its eval.zip) are not in $MME."
    fi
}
score | finish mme "$ANSWERS"
