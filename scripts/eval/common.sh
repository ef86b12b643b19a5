# shellcheck shell=bash
# Sourced by the scripts of this folder, which evaluate a checkpoint: bash scripts/eval/NAME.sh CKPT
#
# Settings (environment variables; the value after the colon is the default):
#   EVAL_DATA      the benchmarks' files, laid out as LLaVA's docs/Evaluation.md says: ./playground/data/eval
#   CONV_MODE      conversation template: the checkpoint's, else what the model's type asks for (the miniature's is
#                  qwen_qa)
#   MODEL_BASE     base model of a LoRA checkpoint
#   MODEL_NAME     what its answers are called; another where two checkpoints' folders have one name: the folder's name
#   MAX_NEW_TOKENS longest answer: 128
#   ENGINE         1 asks LLaVA's six through this package's engine, in batches, with the same prompts; 0 through LLaVA's
#                  model_vqa_loader: 0
#   BATCH_SIZE     with ENGINE=1, questions at a time: 16
#   DTYPE          with ENGINE=1, float32, bfloat16 or float16: what LLaVA's module takes, float16 on a GPU
#   IMAGE_WORKERS  with ENGINE=1, processes that read images for each GPU: up to 8, none on the CPU
#   OVERWRITE      1 asks again what this checkpoint has answered: 0
#   OUTPUT         folder of records and summaries: CKPT/eval
#   PYTHON         the interpreter: python
# Every GPU in CUDA_VISIBLE_DEVICES (every GPU there is, where that is not set) answers a share of the questions.

set -euo pipefail

fail() {
    echo "${0##*/}: $1" >&2
    exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "bash scripts/eval/${0##*/} CKPT"
    sed -n '/^# Settings/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
[[ $# -ge 1 ]] || fail "usage: bash scripts/eval/${0##*/} CKPT"
CKPT=$1
shift
NAME=$(basename "$CKPT")
[[ $NAME != checkpoint-* ]] || NAME=$(basename "$(dirname "$(realpath -m "$CKPT")")")_$NAME # as LLaVA names them
NAME=${MODEL_NAME:-$NAME}
EVAL_DATA=${EVAL_DATA:-./playground/data/eval}
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python3)}
[[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON # some steps run in other folders
"$PYTHON" -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("llava_compodistill", "rich", "torch")))' 2>/dev/null ||
    fail "$PYTHON cannot import llava_compodistill: activate the environment that it is installed in, or set PYTHON."
# The libraries' notices would bury what is said here.
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
# A name on the hub has the form owner/name, and no folder is called like the owner.
[[ -d $CKPT || ($CKPT =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ && ! -d $(dirname "$CKPT")) ]] ||
    fail "checkpoint not found: $CKPT"

need() { # FILE WHERE_FROM
    [[ -e $1 ]] || fail "$1 is missing: $2"
}

EVALUATION_MD="see LLaVA's docs/Evaluation.md (its eval.zip goes to $EVAL_DATA; EVAL_DATA names another folder)"

PIDS=()
trap '[[ -z ${PIDS[*]:-} ]] || { kill "${PIDS[@]}"; wait; } 2>/dev/null || true' EXIT
trap 'echo "Stopped; the same command goes on." >&2; exit 130' INT
trap 'exit 143' TERM

every_gpu() { # 0,1,…; 0 where there is none
    local found
    found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -) || true
    echo "${found:-0}"
}

# ask QUESTIONS IMAGES ANSWERS: LLaVA's model_vqa_loader (ours with ENGINE=1) over all GPUs, for the questions that are
# not answered yet; the shares are joined in ANSWERS, a .jsonl.
ask() {
    local questions=$1 images=$2 answers=$3 index gpus device plan left shares template pid running how
    local module=(llava_compodistill.cli run llava.eval.model_vqa_loader)
    [[ ${ENGINE:-0} == [01] ]] || fail "ENGINE=$ENGINE: must be 1, for the engine, or 0, for LLaVA's module."
    need "$questions" "$EVALUATION_MD"
    need "$images" "$EVALUATION_MD"
    mkdir -p "$(dirname "$answers")"
    # One script at a time: processes that a kill has missed hold the lock too, and would write the same files. (The
    # workers of a stopped one take some seconds to notice.)
    exec 9>"$answers.lock"
    ! command -v flock >/dev/null || flock -w 10 9 || fail "$answers: another process is answering. Wait for it, or stop it."
    gpus=${CUDA_VISIBLE_DEVICES-$(every_gpu)}
    IFS=',' read -ra gpus <<<"${gpus:--1}"
    device=cpu
    [[ ${gpus[0]} == -1 ]] || ! nvidia-smi -L >/dev/null 2>&1 || device=cuda
    plan=$("$PYTHON" -m llava_compodistill.eval.llava_answers begin --device "$device" \
        --questions "$questions" --images "$images" --answers "$answers" --gpus "${#gpus[@]}" \
        --overwrite "${OVERWRITE:-0}" --model "$CKPT" --model-base "${MODEL_BASE:-}" --template "${CONV_MODE:-}" \
        --max-new-tokens "${MAX_NEW_TOKENS:-128}" --engine "${ENGINE:-0}" --dtype "${DTYPE:-}") || exit 2
    read -r left shares template <<<"$plan"
    if [[ $left == 0 && -f $answers ]]; then
        echo "Answered before: $answers (OVERWRITE=1, or eval --overwrite, asks again)"
        return
    fi
    how="in $shares process(es)"
    if [[ ${ENGINE:-0} == 1 ]]; then
        module=(llava_compodistill.eval.vqa_loader --batch-size "${BATCH_SIZE:-16}" ${DTYPE:+--dtype "$DTYPE"}
            ${IMAGE_WORKERS:+--image-workers "$IMAGE_WORKERS"})
        how+=", through the engine"
    fi
    echo "$left questions to ask under the template $template, $how"
    for ((index = 0; index < shares; index++)); do
        CUDA_VISIBLE_DEVICES=${gpus[$index]} "$PYTHON" -m "${module[@]}" \
            --model-path "$CKPT" \
            ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
            --question-file "${answers%.jsonl}/left.jsonl" \
            --image-folder "$images" \
            --answers-file "${answers%.jsonl}/${shares}_$index.jsonl" \
            --num-chunks "$shares" \
            --chunk-idx "$index" \
            --temperature 0 \
            --max_new_tokens "${MAX_NEW_TOKENS:-128}" \
            --conv-mode "$template" &
        PIDS+=($!)
    done
    running=1
    while ((running)); do # the first that fails ends all
        running=0
        for pid in ${PIDS[@]+"${PIDS[@]}"}; do
            if kill -0 "$pid" 2>/dev/null; then
                running=1
            else
                wait "$pid" || fail "a process of $shares failed; what was answered is kept"
            fi
        done
        ((!running)) || sleep 0.5
    done
    PIDS=()
    "$PYTHON" -m llava_compodistill.eval.llava_answers join --questions "$questions" --answers "$answers" >/dev/null ||
        exit 2
}

# scored COMMAND...: LLaVA's or an official scorer. The records are counted here too, so that its failure is no end.
scored() {
    "$@" || echo "The scorer failed (status $?), see above; what is counted from the records stands."
}

# convert NAME FLAGS...: LLaVA's scripts/convert_NAME.py; its package on the registry leaves those out, then ours does
# the same.
convert() {
    local name=$1
    shift
    if [[ -f scripts/convert_$name.py ]]; then
        PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "scripts/convert_$name.py" "$@"
    else
        echo "No scripts/convert_$name.py here: llava_compodistill.eval.submissions writes the same file."
        "$PYTHON" -m llava_compodistill.eval.submissions "$name" "$@"
    fi
}

# finish BENCHMARK ANSWERS: records, summary and table; what the scorer prints comes in, and is shown.
finish() {
    local output=${OUTPUT:-eval/$NAME}
    [[ -n ${OUTPUT:-} || ! -d $CKPT ]] || output=$CKPT/eval
    "$PYTHON" -m llava_compodistill.eval.llava_suite "$1" --answers "$2" --data-root "$EVAL_DATA" \
        --output "$output" --table "${TABLE:-1}"
}

# no_flags "$@": what LLaVA's modules cannot take is refused, not dropped.
no_flags() {
    [[ $# == 0 ]] || fail "unknown: $*. Settings of LLaVA's benchmarks are environment variables, see common.sh."
}

# own BENCHMARK FLAGS...: a benchmark of this package.
own() {
    local benchmark=$1
    shift
    [[ ${OVERWRITE:-0} != 1 ]] || set -- --overwrite "$@"
    exec "$PYTHON" -m llava_compodistill.cli eval --model-path "$CKPT" ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
        --benchmarks "$benchmark" --data-root "$EVAL_DATA" ${CONV_MODE:+--conv-mode "$CONV_MODE"} \
        ${OUTPUT:+--output "$OUTPUT"} "$@"
}
