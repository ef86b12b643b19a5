# shellcheck shell=bash
# Sourced by the training scripts: finds out what the machine has and starts llava_compodistill.train on it, with the
# flags that the stages share. What a stage has of its own stands in its script.
#
# Settings that every script understands (environment variables; the value after the colon is the default):
#   LAUNCHER         auto | deepspeed | torchrun | python. auto: deepspeed or torchrun on several GPUs, python otherwise
#   NPROC            processes on this machine: the number of GPUs, or 1
#   NNODES           machines: 1. The same script is started on each of them, with the same settings, and with
#   MASTER_ADDR, MASTER_PORT   the first machine, as the others reach it, and a free port there: 29500
#   NODE_RANK        this machine's number, from 0, which keeps its ranks the same when the run is started again
#   MAX_RESTARTS     torchrun: how often a failed process, or a machine that comes back, makes all processes begin
#                    again, from the last checkpoint: 0
#   HOSTFILE         deepspeed: machines and their GPUs ("name slots=8", one a line). The script is started on one
#                    machine, which reaches the others by ssh
#   LAUNCHER_ARGS    further flags of the launcher
#   DEEPSPEED_CONFIG with LAUNCHER=deepspeed: zero2.json beside this file (paper: ZeRO-2); zero3.json for less memory
#                    (in a clone of LLaVA compodistill_zero2.json and compodistill_zero3.json: LLaVA's own leave
#                    --max_grad_norm out, and DeepSpeed clips at its own default)
#   PRECISION        auto | bf16 | fp16 | fp32. auto: bf16 where the GPU has it, else fp16; fp32 on a CPU
#                    (the paper trains in fp16)
#   GLOBAL_BATCH     samples per optimizer step; ACCUM = GLOBAL_BATCH / (BATCH * NPROC * NNODES) unless ACCUM is given
#   SAVE_STEPS       steps between two checkpoints, or below 1 the share of the run between them: 0.05. A killed run goes
#                    on from the newest one in OUTPUT; it is the only one kept
#                    (SIGUSR1, SIGTERM and Ctrl-C save one more, after the step at hand, and end with status 75, or 130)
#   WARMUP_RATIO     share of the steps in which the rate rises: 0.03
#   LOGGING_STEPS    steps between two lines of the log: 1
#   REPORT_TO        none | tensorboard | wandb: none
#   GRADIENT_CHECKPOINTING   True | False; False takes more memory and less time: True
#   WORKERS          processes that load data, for each GPU: 4, as in LLaVA (one is enough for most data: README.md)
#   SELECT_LAYER     layer of the vision tower that is read: -2
#   ASPECT_RATIO     pad | square, in fine-tuning stages: pad
#   PYTHON           the interpreter: python
#   DRY_RUN=1        print the command, one argument a line and an empty line after it, instead of running it
# Flags given to a script are passed on and override its own: bash scripts/dft.sh --attention_weight 0.5

set -euo pipefail

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python3)}
LAUNCHER=${LAUNCHER:-auto}
PRECISION=${PRECISION:-auto}
MAX_RESTARTS=${MAX_RESTARTS:-0}
DRY_RUN=${DRY_RUN:-0}

fail() {
    echo "${0##*/}: $1" >&2
    exit 2
}

# need_path WHAT PATH WAY_OUT: stop before any work when an input is missing.
need_path() {
    [[ $DRY_RUN == 1 || -e $2 ]] || fail "$1 not found: $2. $3"
}

# need_data WHAT DATA VARIABLE: as need_path, for one file, several with commas, or a YAML mix.
need_data() {
    local paths=("$2") path
    [[ -e $2 || $2 != *,* ]] || IFS=, read -ra paths <<<"$2"
    for path in "${paths[@]}"; do
        need_path "$1" "$path" "Set $3 to a JSON file in LLaVA's format, several with commas, or a YAML mix."
    done
}

# A hub name has the form owner/name; anything else must exist.
is_hub_name() {
    [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]]
}

need_model() {
    is_hub_name "$2" || need_path "$1" "$2" "$3"
}

# need_checkpoint: as need_model, for what our scripts write: checkpoints/name is a missing folder, not a hub name, where
# there is a folder checkpoints.
need_checkpoint() {
    if [[ -d ${2%%/*} ]] || ! is_hub_name "$2"; then
        need_path "$1" "$2" "$3"
    fi
}

# name_of MODEL: the last part of a path or hub name, as it appears in the names of output folders. LLaVA's tools take a
# folder with "lora" in its name for a LoRA checkpoint, so that word is left to the suffix that LORA=1 adds.
name_of() {
    local LC_ALL=C name=$1
    [[ ! -d $name ]] || name=$(cd "$name" && pwd)
    name=$(basename "$name")
    name=${name,,}
    name=${name//[^a-z0-9._-]/-}
    echo "${name//lora/adapter}"
}

# pair_name STUDENT TEACHER: what the folders of a pair are called. The teacher is named unless it is the default one.
pair_name() {
    local name teacher
    name=$(name_of "$1")
    teacher=$(name_of "$2")
    [[ $teacher == llava-qwen1.5-4b ]] || name+=-from-$teacher
    echo "$name"
}

# lora_suffix: LLaVA's tools know a LoRA checkpoint by its folder's name.
lora_suffix() {
    [[ ${LORA:-0} != 1 ]] || echo -lora
}

# One start of Python tells all about the machine: GPUs, bf16 and tf32 in hardware (0/1), deepspeed installed (0/1).
probe() {
    [[ -z ${GPUS:-} ]] || return 0
    local answer
    answer=$("$PYTHON" - <<'PY'
import importlib.util

import torch

cuda = torch.cuda.is_available()
ampere = int(cuda and torch.cuda.get_device_capability()[0] >= 8)
deepspeed = int(importlib.util.find_spec("deepspeed") is not None)
print(torch.cuda.device_count() if cuda else 0, ampere, ampere, deepspeed)
PY
    ) || fail "$PYTHON cannot import torch: activate the environment with llava-compodistill, or set PYTHON."
    read -r GPUS HAS_BF16 HAS_TF32 HAS_DEEPSPEED <<<"$answer"
}

# whole_number NAME VALUE LEAST
whole_number() {
    if [[ ! $2 =~ ^[0-9]+$ ]] || ((10#$2 < $3)); then
        fail "$1=$2: must be a whole number of at least $3."
    fi
}

# read_hostfile: NNODES and NPROC, from DeepSpeed's file of machines.
read_hostfile() {
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file. It names the machines: \"name slots=8\", one a line."
    local slots
    slots=$(sed -nE 's/^[^#]*[[:space:]]slots=([0-9]+).*/\1/p' "$HOSTFILE")
    [[ -n $slots ]] || fail "HOSTFILE=$HOSTFILE: no machine in it. Write \"name slots=8\", one a line."
    [[ $(sort -u <<<"$slots" | wc -l) == 1 ]] || fail "HOSTFILE=$HOSTFILE: give all machines the same number of slots."
    [[ -z ${NNODES:-} ]] || ((NNODES <= $(wc -l <<<"$slots"))) ||
        fail "NNODES=$NNODES: there are $(wc -l <<<"$slots") machines in HOSTFILE=$HOSTFILE."
    NNODES=${NNODES:-$(wc -l <<<"$slots")}
    NPROC=${NPROC:-$(head -n 1 <<<"$slots")}
}

# machines: check what is said about the others.
machines() {
    [[ -z ${HOSTFILE:-} ]] || read_hostfile
    NNODES=${NNODES:-1}
    NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
    MASTER_PORT=${MASTER_PORT:-29500}
    whole_number NNODES "$NNODES" 1
    whole_number NPROC "$NPROC" 1
    whole_number MASTER_PORT "$MASTER_PORT" 1
    whole_number MAX_RESTARTS "$MAX_RESTARTS" 0
    if [[ -n ${NODE_RANK:-} ]]; then
        whole_number NODE_RANK "$NODE_RANK" 0
        ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK: with NNODES=$NNODES machines it is at most $((NNODES - 1))."
    fi
    if ((NNODES > 1)) && [[ -z ${HOSTFILE:-} ]]; then
        [[ $LAUNCHER != deepspeed ]] ||
            fail "LAUNCHER=deepspeed on NNODES=$NNODES machines needs HOSTFILE; or set LAUNCHER=torchrun, with DEEPSPEED_CONFIG."
        [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the first machine as the others reach it."
    fi
    if [[ -n ${HOSTFILE:-} ]]; then
        [[ $LAUNCHER != auto ]] || LAUNCHER=deepspeed
        [[ $LAUNCHER == deepspeed ]] || fail "HOSTFILE is for LAUNCHER=deepspeed; with torchrun set NNODES and MASTER_ADDR."
    elif [[ $LAUNCHER == auto ]] && ((NNODES > 1 || MAX_RESTARTS)); then
        # Each machine starts its own processes; ZeRO needs no launcher of its own.
        LAUNCHER=torchrun
        ((NPROC * NNODES == 1 || !HAS_DEEPSPEED)) || DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-$(default_zero)}
    fi
    if ((MAX_RESTARTS)); then
        [[ $LAUNCHER == torchrun ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: LAUNCHER=$LAUNCHER cannot restart: use torchrun."
    fi
}

# default_zero: in a checkout whose own zero2.json differs, as LLaVA's does, ours has the longer name.
default_zero() {
    local config=$SCRIPTS/compodistill_zero2.json
    [[ -f $config ]] || config=$SCRIPTS/zero2.json
    echo "$config"
}

# meeting: how torchrun's processes on several machines find each other, into COMMAND.
meeting() {
    if ((NNODES > 1)) && [[ -n ${NODE_RANK:-} ]] && ((!MAX_RESTARTS)); then
        COMMAND+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    elif ((NNODES > 1 || MAX_RESTARTS)); then
        # Machines may come back, and get other numbers then.
        local endpoint=localhost:0
        ((NNODES == 1)) || endpoint=$MASTER_ADDR:$MASTER_PORT
        COMMAND+=(--rdzv_backend c10d --rdzv_endpoint "$endpoint")
        COMMAND+=(--rdzv_id "${RDZV_ID:-llava-compodistill}" --max_restarts "$MAX_RESTARTS")
        # Otherwise (torch 2.13) the first machine does not tell one that comes back where the others are.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        [[ -z ${NODE_RANK:-} ]] || COMMAND+=(--rdzv_conf "is_host=$((NODE_RANK == 0))")
    fi
}

choose_launcher() {
    machines
    if [[ $LAUNCHER == auto ]]; then
        if ((NPROC * NNODES == 1)); then
            LAUNCHER=python
        elif ((HAS_DEEPSPEED)); then
            LAUNCHER=deepspeed
        else
            echo "${0##*/}: deepspeed is not installed, training without ZeRO (pip install deepspeed)" >&2
            LAUNCHER=torchrun
        fi
    fi
    # shellcheck disable=SC2206 # LAUNCHER_ARGS is meant to be split into words
    local more=(${LAUNCHER_ARGS:-})
    case $LAUNCHER in
        deepspeed)
            COMMAND=("$PYTHON" -m deepspeed.launcher.runner)
            if [[ -n ${HOSTFILE:-} ]]; then
                COMMAND+=(--hostfile "$HOSTFILE" --num_nodes "$NNODES" --num_gpus "$NPROC" --master_port "$MASTER_PORT")
                [[ -z ${MASTER_ADDR:-} ]] || COMMAND+=(--master_addr "$MASTER_ADDR")
            elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] && ((GPUS)); then
                # With --num_gpus deepspeed ignores CUDA_VISIBLE_DEVICES and takes the first GPUs of the machine.
                COMMAND+=(--include "localhost:$(cut -d, -f "1-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")")
            else
                COMMAND+=(--num_gpus "$NPROC" --num_nodes "$NNODES")
            fi
            COMMAND+=(--no_local_rank "${more[@]}" --module llava_compodistill.train)
            ((GPUS)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
            ;;
        torchrun)
            COMMAND=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes "$NNODES")
            meeting
            COMMAND+=("${more[@]}" -m llava_compodistill.train)
            ;;
        python)
            ((NPROC * NNODES == 1)) || fail "LAUNCHER=python runs one process, not NPROC=$NPROC: use torchrun or deepspeed."
            COMMAND=("$PYTHON" -m llava_compodistill.train)
            ;;
        *) fail "LAUNCHER=$LAUNCHER: must be auto, deepspeed, torchrun or python." ;;
    esac
}

# Flags that depend on the machine rather than on the method, into MACHINE.
machine_flags() {
    MACHINE=()
    local config=${DEEPSPEED_CONFIG:-}
    if [[ -z $config && $LAUNCHER == deepspeed ]]; then
        config=$(default_zero)
    fi
    if [[ -n $config && $config != none ]]; then
        [[ -f $config ]] || fail "DEEPSPEED_CONFIG=$config: no such file. There are zero2.json and zero3.json in $SCRIPTS."
        MACHINE+=(--deepspeed "$config")
    fi
    local precision=$PRECISION
    if [[ $precision == auto ]]; then
        precision=fp32
        ((!GPUS)) || precision=fp16
        ((!HAS_BF16)) || precision=bf16
    fi
    case $precision in
        bf16) MACHINE+=(--bf16 True) ;;
        fp16) MACHINE+=(--fp16 True) ;;
        fp32) ;;
        *) fail "PRECISION=$PRECISION: must be auto, bf16, fp16 or fp32." ;;
    esac
    ((!HAS_TF32)) || MACHINE+=(--tf32 True)
    ((GPUS)) || MACHINE+=(--use_cpu True)
}

# Micro-batch and accumulation that make up the global batch, into BATCHES.
batch_flags() {
    local each=$((BATCH * NPROC * NNODES))
    if [[ -z ${ACCUM:-} ]] && ((GLOBAL_BATCH % each)); then
        fail "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of BATCH*NPROC*NNODES=$BATCH*$NPROC*$NNODES: change one, or set ACCUM."
    fi
    BATCHES=(
        --per_device_train_batch_size "$BATCH"
        --gradient_accumulation_steps "${ACCUM:-$((GLOBAL_BATCH / each))}"
    )
}

# Flags of every stage, into COMMON.
common_flags() {
    COMMON=(
        --data_path "$DATA"
        --image_folder "$IMAGES"
        --vision_tower "$TOWER"
        --mm_vision_select_layer "${SELECT_LAYER:--2}"
        --mm_use_im_start_end False
        --mm_use_im_patch_token False
        --output_dir "$OUTPUT"
        --num_train_epochs "$EPOCHS"
        --save_strategy steps
        --save_steps "${SAVE_STEPS:-0.05}"
        --save_total_limit 1
        --learning_rate "$LR"
        --weight_decay 0.
        --warmup_ratio "${WARMUP_RATIO:-0.03}"
        --lr_scheduler_type cosine
        --logging_steps "${LOGGING_STEPS:-1}"
        --model_max_length "$MAX_LENGTH"
        --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}"
        --dataloader_num_workers "${WORKERS:-4}"
        --lazy_preprocess True
        --report_to "${REPORT_TO:-none}"
    )
}

# LoRA of the language model, into LORA_FLAGS; empty unless LORA=1.
lora_flags() {
    # shellcheck disable=SC2034 # used by the scripts that source this file
    LORA_FLAGS=()
    # shellcheck disable=SC2034
    [[ $LORA != 1 ]] || LORA_FLAGS=(--lora_enable True --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA")
}

# attention_flags: the stages that train L_ADL, into ATTENTION; empty for the default.
attention_flags() {
    # shellcheck disable=SC2034 # used by the scripts that source this file
    ATTENTION=()
    # shellcheck disable=SC2034
    [[ $ATTENTION_STAGES == dft ]] || ATTENTION=(--attention_stages "$ATTENTION_STAGES")
}

# pass_on SIGNAL: to the processes that train, which finish their step and save. Launchers would end them, or not notice.
pass_on() {
    local pid
    for pid in $(trainers_of "$JOB"); do
        kill -s "$1" "$pid" 2>/dev/null || true
    done
}

# trainers_of PID: what a launcher has started, through launchers of its own; PID itself where there is no launcher.
trainers_of() {
    local file line parent rest
    if [[ $LAUNCHER == python || ($1 != "$JOB" && $(tr '\0' ' ' <"/proc/$1/cmdline") != *deepspeed.launcher*) ]]; then
        echo "$1"
        return
    fi
    for file in /proc/[0-9]*/stat; do
        read -r line 2>/dev/null <"$file" || continue # it has ended
        rest=${line##*) }
        read -r _ parent _ <<<"$rest"
        [[ $parent != "$1" ]] || trainers_of "${line%% *}"
    done
}

# run_command: COMMAND, with signals passed on, and with the exit status of the training, which torchrun replaces by 1.
run_command() {
    local status=0 told
    told=$(mktemp)
    set -m # in a group of its own, or it would not get Ctrl-C
    COMPODISTILL_STATUS=$told "${COMMAND[@]}" &
    set +m
    JOB=$!
    trap 'pass_on USR1' USR1
    trap 'pass_on INT' INT
    trap 'pass_on TERM' TERM HUP
    while true; do # a signal interrupts the waiting
        wait "$JOB" || true
        kill -0 "$JOB" 2>/dev/null || break
    done
    wait "$JOB" || status=$? # which bash has kept; an interrupted wait gives the signal's
    trap - USR1 INT TERM HUP
    if [[ -s $told && $(<"$told") != 0 ]]; then
        status=$(<"$told")
    fi
    rm -f "$told"
    return "$status"
}

# launch FLAGS...: run the training with these flags beside the common ones; flags later in the list win.
launch() {
    probe
    choose_launcher
    machine_flags
    batch_flags
    common_flags
    COMMAND+=("${MACHINE[@]}" "${BATCHES[@]}" "${COMMON[@]}" "$@")
    if [[ $DRY_RUN == 1 ]]; then
        printf '%s\n' "${COMMAND[@]}" ''
    else
        echo "${0##*/}: ${COMMAND[*]}" >&2
        run_command
    fi
}

# Pre-training on captions, without a conversation template.
train_on_captions() {
    launch --version plain "$@"
}

# Fine-tuning on instruction data, under the template VERSION.
train_on_instructions() {
    launch \
        --version "$VERSION" \
        --image_aspect_ratio "${ASPECT_RATIO:-pad}" \
        --group_by_modality_length True \
        "$@"
}
