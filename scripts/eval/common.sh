# shellcheck shell=bash
# Sourced by the scripts of this folder, which evaluate a checkpoint: bash scripts/eval/NAME.sh CKPT
#
# Settings (environment variables; the value after the colon is the default):
#   EVAL_DATA      the benchmarks' files, laid out as LLaVA's docs/Evaluation.md says: ./playground/data/eval
#   CONV_MODE      conversation template: qwen_1_5 (v1 for Vicuna, qwen_qa for the miniature)
#   MODEL_BASE     base model of a LoRA checkpoint
#   MAX_NEW_TOKENS longest answer: 128
#   OVERWRITE      1 asks again what this checkpoint has answered: 0
#   PYTHON         the interpreter: python
# Every GPU in CUDA_VISIBLE_DEVICES answers a share of the questions, as in LLaVA's scripts.

set -euo pipefail

fail() {
    echo "${0##*/}: $1" >&2
    exit 2
}

[[ $# -ge 1 ]] || fail "usage: bash scripts/eval/${0##*/} CKPT"
CKPT=$1
shift
NAME=$(basename "$CKPT")
export NAME
EVAL_DATA=${EVAL_DATA:-./playground/data/eval}
CONV_MODE=${CONV_MODE:-qwen_1_5}
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python3)}
# A name on the hub has the form owner/name, and no folder is called like the owner.
[[ -d $CKPT || ($CKPT =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ && ! -d $(dirname "$CKPT")) ]] ||
    fail "checkpoint not found: $CKPT"

need() { # FILE WHERE_FROM
    [[ -e $1 ]] || fail "$1 is missing: $2"
}

EVALUATION_MD="see LLaVA's docs/Evaluation.md (its eval.zip goes to $EVAL_DATA)"

# ask QUESTIONS IMAGES ANSWERS: LLaVA's model_vqa_loader over all GPUs; the shares are joined in ANSWERS, a .jsonl.
ask() {
    local questions=$1 images=$2 answers=$3 index gpus chunks
    local pids=()
    need "$questions" "$EVALUATION_MD"
    need "$images" "$EVALUATION_MD"
    local stamp count
    count=$(grep -c '' "$questions")
    # What the answers depend on; another checkpoint may have the same name.
    stamp=$(
        printf '%s\n' "$(realpath -m "$CKPT")" "$CONV_MODE" "${MODEL_BASE:-}" "${MAX_NEW_TOKENS:-128}"
        cksum <"$questions"
        if [[ -d $CKPT ]]; then
            find "$CKPT" -maxdepth 1 \( -name '*.safetensors' -o -name '*.bin' -o -name config.json \) \
                -printf '%f %s %T@\n' | sort
        fi
    )
    if [[ ${OVERWRITE:-0} != 1 && -f $answers && -f $answers.of && $(<"$answers.of") == "$stamp" ]]; then
        echo "Answered before: $answers (OVERWRITE=1 asks again)"
        return
    fi
    IFS=',' read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-0}"
    chunks=${#gpus[@]}
    mkdir -p "${answers%.jsonl}"
    for index in $(seq 0 $((chunks - 1))); do
        CUDA_VISIBLE_DEVICES=${gpus[$index]} "$PYTHON" -m llava_compodistill.cli run llava.eval.model_vqa_loader \
            --model-path "$CKPT" \
            ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
            --question-file "$questions" \
            --image-folder "$images" \
            --answers-file "${answers%.jsonl}/${chunks}_$index.jsonl" \
            --num-chunks "$chunks" \
            --chunk-idx "$index" \
            --temperature 0 \
            --max_new_tokens "${MAX_NEW_TOKENS:-128}" \
            --conv-mode "$CONV_MODE" &
        pids+=($!)
    done
    for index in "${!pids[@]}"; do
        wait "${pids[$index]}" || fail "share $index of $chunks failed"
    done
    for index in $(seq 0 $((chunks - 1))); do
        cat "${answers%.jsonl}/${chunks}_$index.jsonl"
    done >"$answers.part"
    [[ $(grep -c '' "$answers.part") == "$count" ]] ||
        fail "$answers.part has $(grep -c '' "$answers.part") answers to the $count questions of $questions"
    mv "$answers.part" "$answers"
    echo "$stamp" >"$answers.of"
}

# converter FILE: a script of LLaVA's repository, which its package on the registry leaves out.
converter() {
    need "scripts/$1" "run this in a git checkout of LLaVA, which has it"
}

# own BENCHMARK FLAGS...: a benchmark of this package.
own() {
    local benchmark=$1
    shift
    exec "$PYTHON" -m llava_compodistill.cli eval --model-path "$CKPT" ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
        --benchmarks "$benchmark" --data-root "$EVAL_DATA" --conv-mode "$CONV_MODE" "$@"
}
