"""Flags that contradict each other, or a stage that cannot use them: said before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..hosts.llava.quantization import refuse_without_bitsandbytes
from ..methods.schedule import ENDS
from ..pair.layers import parse_band
from ..pair.placement import QUANTISED, SHARDED, fully_shard
from ..record.padding import check_backend
from .compiling import check_compiled, check_liger
from .sharding import check_fsdp

if TYPE_CHECKING:
    from .arguments import DataArguments, ModelArguments, TrainingArguments

STAGES = ("pt", "dpt", "dft", "sft")
#: Stages that train the adapter alone (method.md, "Three stages").
ADAPTER_STAGES = ("pt", "dpt")


def check_alignment(training: TrainingArguments) -> None:
    """Check and complete what --attention_stages and --attention_schedule say."""
    given = training.attention_stages.replace(" ", "").split(",")
    changed = given != ["dft"] or training.attention_schedule != "constant"
    if changed and not training.chosen_method.aligns_attention:
        flag = f"--attention_stages {training.attention_stages}"
        if given == ["dft"]:
            flag = f"--attention_schedule {training.attention_schedule}"
        raise ValueError(f"{flag}: method {training.method} has no L_ADL. Leave the flag out.")
    recipe = training.chosen_method.recipe
    if changed and not set(given) <= set(recipe):
        raise ValueError(
            f"--attention_stages {training.attention_stages}: name stages of method {training.method}, with commas: "
            f"{', '.join(recipe)}. (--vat False trains L_ADL in none.)"
        )
    training.attention_stages = ",".join(stage for stage in recipe if stage in given) or training.attention_stages
    end, schedule = training.attention_schedule_end, training.attention_schedule
    if schedule == "constant":
        if end is not None:
            raise ValueError(
                f"--attention_schedule_end {end}: a constant weight has no end. Add --attention_schedule "
                f"{', '.join(ENDS)}."
            )
        return
    if not (training.vat and training.attention_weight > 0):
        off = "--vat False" if not training.vat else f"--attention_weight {training.attention_weight:g}"
        raise ValueError(f"--attention_schedule {schedule}: with {off} there is no L_ADL. Leave one of them out.")
    if end is None:
        training.attention_schedule_end = ENDS[schedule]
    elif not 0 < end <= 1:
        raise ValueError(
            f"--attention_schedule_end {end}: must be greater than 0 and at most 1, a share of the stage."
        )


def check_advantage(training: TrainingArguments) -> None:
    value, method = training.visual_advantage, training.chosen_method
    if not 0 < training.advantage_floor < math.inf:
        raise ValueError(
            f"--advantage_floor {training.advantage_floor}: must be greater than 0, or all weights of a sample could "
            "be 0, and finite."
        )
    if value == "none":
        if training.shuffle_advantage:
            raise ValueError("--shuffle_advantage True: nothing is weighed without --visual_advantage.")
        return
    of_tokens, of_rows = value in ("tokens", "both"), value in ("rows", "both")
    why = None
    if value not in method.weighed:
        takes = " and ".join(method.weighed) or "none"
        why = f"--method {training.method} takes {takes}; kd takes tokens, compodistill tokens, rows and both"
    elif not training.distilled:
        why = f"--stage {training.stage} of {training.method} has no teacher: leave the flag out"
    elif of_tokens and training.stage not in method.teacher_stages:
        why = f"it weighs the tokens of L_KL, which is not part of --stage {training.stage}: use rows here"
    elif of_tokens and not training.kl_weight:
        why = "it weighs the tokens of L_KL, which --kl_weight 0 leaves out"
    elif of_rows and not method.aligns(training.stage, training):
        why = (
            "it weighs the rows of L_ADL, which is trained in the stages of --attention_stages (default: dft), with "
            "--vat True and an --attention_weight above 0: use tokens"
        )
    elif of_rows and training.attention_rows == "visual":
        why = "--attention_rows visual leaves out the queries that predict an answer token: use all, text or answer"
    elif of_rows and training.attention_loss == "cosine" and training.attention_similarity == "matrix":
        why = "--attention_similarity matrix compares whole maps, which have no rows to weigh: use row, or tokens here"
    if why is not None:
        raise ValueError(f"--visual_advantage {value}: {why}.")


def check_image_layers(training: TrainingArguments) -> None:
    if parse_band(training.image_layers, "image_layers") != "all" and training.distilled:
        raise ValueError(
            f"--image_layers {training.image_layers}: not in --stage {training.stage} of {training.method}, whose "
            "student learns from a teacher that sees the image in every layer. Leave the flag out."
        )


def check_packing(training: TrainingArguments) -> None:
    """Check and complete what --pack_length says."""
    if training.pack_length < 0:
        raise ValueError(f"--pack_length {training.pack_length}: must be a number of tokens, or 0 for no packs.")
    grouped = [name for name in ("group_by_modality_length", "group_by_length") if getattr(training, name, False)]
    ways = [f"set --{name} False" for name in grouped]
    strategy = getattr(training, "train_sampling_strategy", "random")  # of transformers 5
    if strategy not in ("random", "sequential"):
        ways.append(f"leave --train_sampling_strategy {strategy} out")
    if training.pack_length and ways:
        raise ValueError(
            f"--pack_length {training.pack_length}: packs are about equally long, and there is nothing to group: "
            f"{' and '.join(ways)}."
        )
    training.padding_free = training.padding_free or training.pack_length > 0


def check_arguments(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, here: bool = True
) -> None:
    """Check what no single dataclass can see, before anything is loaded.

    Args:
        here: whether it is this process that is to train: its devices, packages and number count, too.

    Raises:
        ValueError: naming the flags that contradict each other, and the way out.
    """
    aligned = f"--attention_stages {training.attention_stages}"
    if training.distilled and training.stage not in training.chosen_method.teacher_stages:
        if not model.teacher_model_path:
            raise ValueError(
                f"{aligned} aligns attention with a teacher's in --stage {training.stage}: give --teacher_model_path "
                "(sft.sh: set ATTENTION_STAGES instead of the flag), or name other stages."
            )
    if training.distilled and not model.teacher_model_path:
        raise ValueError(
            f"--stage {training.stage} distils from a teacher: give --teacher_model_path, or use --stage "
            f"{'pt' if training.stage == 'dpt' else 'sft'} to train without one."
        )
    if model.teacher_version and not training.distilled:
        raise ValueError(
            f"--teacher_version {model.teacher_version}: no teacher reads samples in --stage {training.stage} of "
            f"--method {training.method}. Leave the flag out."
        )
    if model.teacher_cache:
        check_cached(model, training)
    if not model.vision_tower:
        raise ValueError("--vision_tower is missing: name a CLIP or SigLIP encoder or the folder of one.")
    if model.taf_depth not in (1, 2):
        raise ValueError(f"--taf_depth {model.taf_depth}: MLP_S has 1 or 2 linear layers.")
    if training.stage in ADAPTER_STAGES and training.lora_enable:
        raise ValueError(f"--stage {training.stage} trains the adapter alone: --lora_enable does not go with it.")
    if training.stage in training.chosen_method.whole_stages and (training.lora_enable or training.bits in (4, 8)):
        flag = "--lora_enable" if training.lora_enable else f"--bits {training.bits}"
        raise ValueError(f"--stage {training.stage} of {training.method} takes whole weights: leave {flag} out.")
    _check_trained_tower(model, training)
    check_fsdp(training)
    if model.mm_use_im_start_end and (training.stage in ADAPTER_STAGES or training.lora_enable):
        what = "the adapter alone" if training.stage in ADAPTER_STAGES else "the adapter and LoRA weights"
        raise ValueError(
            f"--mm_use_im_start_end True adds two tokens to the language model, and this run trains and saves {what}: "
            "their embeddings would stay random. Leave the flag out (a checkpoint that has the tokens keeps them), or "
            "train the whole language model with --stage dft or sft and without --lora_enable."
        )
    check_placement(training, here)
    check_float8(training)
    check_bits(training, here)
    check_liger(training, here)
    check_compiled(training, here)
    if here and training.fp16 and training.device.type == "cpu":
        raise ValueError("--fp16 True: there is no fp16 training on a CPU. Use --bf16 True, or neither.")
    if training.padding_free:
        check_backend(model.attn_implementation or "sdpa")
    if training.shuffle_attention_targets and training.per_device_train_batch_size < 2:
        raise ValueError(
            "--shuffle_attention_targets needs --per_device_train_batch_size of at least 2, also with packs, because "
            "a pack may hold a single image."
        )
    if not data.data_path:
        raise ValueError(
            "--data_path is missing: give a JSON file of conversations, several with commas, or a YAML mix."
        )


def check_cached(model: ModelArguments, training: TrainingArguments) -> None:
    """Refuse a --teacher_cache in a run that cannot do with one.

    Raises:
        ValueError: naming the flags and the way out.
    """
    why = uncached(training)
    if why is None and training.teacher_placement != "auto":
        why = f"no teacher is loaded: leave --teacher_placement {training.teacher_placement} out"
    if why is None and training.teacher_dtype == "float8":
        why = "no teacher is loaded: leave --teacher_dtype float8 out"
    if why is None and training.compile_layers in ("teacher", "both"):
        why = f"no teacher is loaded: --compile_layers {training.compile_layers} has to be student or none"
    if why is not None:
        raise ValueError(f"--teacher_cache {model.teacher_cache}: {why}.")


def uncached(training: TrainingArguments) -> str | None:
    """Why a stage's teacher cannot come from a cache, as its flags tell; None where they do not."""
    if not training.distilled:
        return f"no teacher is in the loss of --stage {training.stage} of {training.method}: leave the flag out"
    if training.on_policy:
        return f"with --on_policy {training.on_policy:g} the teacher reads answers that the student gives as it trains"
    if training.shuffle_attention_targets:
        return "--shuffle_attention_targets reads another sample's map at this one's rows, which a cache may not hold"
    if training.paired:
        return f"--stage {training.stage} of {training.method} takes pairs of answers, which a cache does not hold"
    return None


def check_placement(training: TrainingArguments, here: bool = True) -> None:
    """Refuse a --teacher_placement that cannot run, or not here.

    Raises:
        ValueError: naming the flag and the way out.
    """
    placement = training.teacher_placement
    if placement == "auto":
        return
    flag, why = f"--teacher_placement {placement}", None
    if not training.distilled:
        why = f"no teacher is in the loss of --stage {training.stage} of {training.method}: leave the flag out"
    elif placement == "zero3" and not training.deepspeed:
        why = "partitions the teacher by DeepSpeed: add --deepspeed zero2.json or zero3.json, or use fsdp or offload"
    elif placement == "fsdp" and fully_shard() is None:
        why = f"needs torch 2.6 or newer (FSDP2), and this is {torch.__version__}: use zero3 or offload"
    elif here and placement in SHARDED and training.world_size < 2:
        why = (
            "shares the layers among processes, and there is one: start several (torchrun, deepspeed), or use offload"
        )
    if why is not None:
        raise ValueError(f"{flag}: {why}.")
    if here and placement in QUANTISED:
        refuse_without_bitsandbytes(flag, training.device)


def check_float8(training: TrainingArguments) -> None:
    """Refuse --teacher_dtype float8 where no teacher is, or where its layers cannot live.

    Raises:
        ValueError: naming the flags and the way out.
    """
    if training.teacher_dtype != "float8":
        return
    placement, why = training.teacher_placement, None
    if not training.distilled:
        why = f"no teacher is in the loss of --stage {training.stage} of {training.method}: leave the flag out"
    elif placement in QUANTISED:
        why = f"--teacher_placement {placement} quantises the same weights: leave one of them out"
    elif placement in SHARDED:
        why = f"--teacher_placement {placement} shares layers of one precision: use replicate or offload, or bfloat16"
    if why is not None:
        raise ValueError(f"--teacher_dtype float8: {why}.")


def check_bits(training: TrainingArguments, here: bool = True) -> None:
    """Refuse a --bits (QLoRA) that cannot run, or not here.

    Raises:
        ValueError: naming the flags and the way out.
    """
    bits, why = training.bits, None
    if bits == 16:
        return
    zero = getattr(training, "hf_deepspeed_config", None) if training.deepspeed else None
    if bits not in (4, 8):
        why = "must be 4 or 8 (QLoRA), or 16"
    elif training.stage in ADAPTER_STAGES:
        why = f"--stage {training.stage} trains the adapter alone, without LoRA: leave the flag out"
    elif not training.lora_enable:
        why = "quantised weights cannot be trained themselves: add --lora_enable True, or leave the flag out"
    elif zero is not None and zero.is_zero3():
        why = "ZeRO-3 cannot partition quantised weights: use ZeRO-2, or DDP"
    elif training.fsdp:
        why = "not with --fsdp, which cannot shard weights quantised here: use ZeRO-2, or DDP"
    elif training.quant_type not in ("nf4", "fp4"):
        why = f"--quant_type {training.quant_type} is neither nf4 nor fp4"
    if why is not None:
        raise ValueError(f"--bits {bits}: {why}.")
    if here:
        refuse_without_bitsandbytes(f"--bits {bits}", training.device)


def _check_trained_tower(model: ModelArguments, training: TrainingArguments) -> None:
    if not model.unfreeze_mm_vision_tower:
        if training.mm_vision_tower_lr is not None:
            raise ValueError(
                "--mm_vision_tower_lr is for an encoder that is trained: add --unfreeze_mm_vision_tower True."
            )
        return
    why = None
    if training.stage in ADAPTER_STAGES:
        why = f"--stage {training.stage} trains and saves the adapter alone: unfreeze the encoder in dft or sft"
    elif training.lora_enable:
        why = "a LoRA checkpoint has no place for the encoder's weights: train without --lora_enable"
    elif training.fsdp:
        why = "LLaVA keeps the encoder out of FSDP's units: use DDP or DeepSpeed"
    if why is not None:
        raise ValueError(f"--unfreeze_mm_vision_tower True: {why}.")
    if training.mm_vision_tower_lr is not None and training.mm_vision_tower_lr < 0:
        raise ValueError(f"--mm_vision_tower_lr {training.mm_vision_tower_lr}: cannot be negative.")
