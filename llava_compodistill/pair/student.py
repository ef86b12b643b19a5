"""The student that a stage starts from: built or loaded, frozen and unfrozen by stage, wrapped in LoRA."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import CheckpointError
from ..hosts.llava import register
from ..hosts.llava.model import has_own_tower, llava_core, projector
from ..hosts.llava.quantization import quantization_config
from ..hosts.llava.taf import PROJECTOR_TYPE, TAFProjector, fetch_teacher_adapter, taf_config

logger = logging.getLogger(__name__)


def build_student(model_args: Any, training_args: Any, teacher: Any = None) -> nn.Module:
    """Build the student that a stage starts from: a language model, or a checkpoint of an earlier stage.

    With `--mm_projector_type taf` a new adapter gets its frozen part from the teacher, else from the checkpoint
    named by `--pretrain_mm_mlp_adapter` or the student's own.

    Args:
        teacher: a model; or, where it is not loaded, its `config` and a function `adapter` that reads its adapter.

    Returns:
        A LLaVA causal language model, or a PeftModel around one with `--lora_enable`.

    Raises:
        CheckpointError, ValueError: naming the flag, the folder and the way out.
    """
    register()
    from ..hosts.llava.loader import load_lora_weights

    method, stage = training_args.chosen_method, training_args.stage
    changes = method.changes_student(stage)
    with compat.outside_zero3() if changes else contextlib.nullcontext():
        model = _load_student(model_args, training_args)
        core = llava_core(model)
        if changes:
            method.change_student(core, stage)
    core.config.use_cache = False
    continued = getattr(core.get_model(), "mm_projector", None) is not None
    if continued:
        _keep_vision(core.config, model_args)
    elif model_args.mm_projector_type == PROJECTOR_TYPE:
        describe_taf(core.config, model_args, None if teacher is None else teacher.config)
    _initialize_vision(core, model_args, training_args)
    if not model_args.pretrain_mm_mlp_adapter and not continued:
        if isinstance(projector(core), TAFProjector):
            loaded = isinstance(teacher, nn.Module)
            fetch_teacher_adapter(projector(core), projector(teacher) if loaded else teacher.adapter())
        if stage not in ("pt", "dpt"):
            logger.warning("The adapter starts from random weights: --pretrain_mm_mlp_adapter loads a trained one.")
    continues_lora = _is_peft(model)
    if training_args.bits in (4, 8):
        prepare_quantised(core, compute_dtype(training_args))
    if training_args.lora_enable and not continues_lora:
        model = add_lora(model, training_args)
    set_trainable(
        model,
        stage,
        freeze_backbone=model_args.freeze_backbone,
        freeze_adapter=training_args.freeze_mm_mlp_adapter,
        trained=partial(method.trained, stage),
        train_encoder=model_args.unfreeze_mm_vision_tower,
    )
    if not training_args.deepspeed:  # what is trained is held in fp32, see student_dtype
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if continues_lora:  # so far rounded to the precision of the frozen base
            load_lora_weights(model, model_args.model_name_or_path)
    if model_args.pretrain_mm_mlp_adapter:
        _load_adapter(core, model_args.pretrain_mm_mlp_adapter)
    return model


def set_trainable(
    model: nn.Module,
    stage: str,
    *,
    freeze_backbone: bool = False,
    freeze_adapter: bool = False,
    trained: Callable[[str], bool] = lambda name: True,
    train_encoder: bool = False,
) -> None:
    """Freeze and unfreeze by stage (paper, Section 4.3). P_T is frozen in every stage, and so is the vision encoder
    but with `train_encoder`.

    Args:
        trained: says of a weight of the language model, by its name, whether it is trained where the stage trains the
            language model.
    """
    core = llava_core(model)
    adapter = projector(core)
    if stage in ("pt", "dpt"):
        model.requires_grad_(False)
    elif not _is_peft(model):
        for name, parameter in core.named_parameters():
            parameter.requires_grad_(not freeze_backbone and trained(name))
    if core.get_vision_tower() is not None:
        core.get_vision_tower().requires_grad_(False)
    if train_encoder:
        from ..hosts.llava.trained_towers import train_tower

        train_tower(core.get_vision_tower())
    adapter.requires_grad_(not freeze_adapter)
    if isinstance(adapter, TAFProjector):
        adapter.teacher_adapter.requires_grad_(False)


def check_start(model_args: Any, training_args: Any) -> None:
    """Refuse a folder that the student cannot start from, by the kind of checkpoint that it holds.

    Raises:
        CheckpointError: naming the flag, the folder and the way out.
    """
    from ..hosts.llava.loader import checkpoint_kind

    path = model_args.model_name_or_path
    kind = checkpoint_kind(path) if os.path.isdir(path) else "base"
    if kind == "adapter":
        raise CheckpointError(
            f"--model_name_or_path {path} holds an adapter only: name the language model there and "
            f"--pretrain_mm_mlp_adapter {os.path.join(path, 'mm_projector.bin')}."
        )
    if kind == "lora" and not training_args.lora_enable:
        raise CheckpointError(f"--model_name_or_path {path} is a LoRA checkpoint: go on with --lora_enable True.")
    if kind == "lora":
        _keep_lora(path, training_args)


def _load_student(model_args: Any, training_args: Any) -> nn.Module:
    from ..hosts import load_model

    check_start(model_args, training_args)
    options = compat.dtype_argument(student_dtype(training_args))
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    if training_args.bits in (4, 8):
        options["quantization_config"] = quantization_config(
            training_args.bits, compute_dtype(training_args), training_args.quant_type, training_args.double_quant
        )
        options["device_map"] = {"": training_args.device}
    return load_model(model_args.model_name_or_path, merge_lora=False, vision_tower=model_args.vision_tower, **options)


def _keep_lora(path: str, training_args: Any) -> None:
    """A LoRA goes on with the rank it has. A flag that asks for another one is refused, its default is not.

    Raises:
        CheckpointError: naming the flag and both values.
    """
    from ..hosts.llava.loader import read_lora_config

    config = read_lora_config(path)
    for flag, key in _LORA_FLAGS.items():
        kept, given = config.get(key), getattr(training_args, flag)
        if kept is None or kept == given:
            continue
        if given != getattr(type(training_args), flag, None):
            raise CheckpointError(
                f"--{flag} {given}: the LoRA in {path} has {key} {kept}, which cannot change when training continues. "
                f"Give --{flag} {kept}, "
                "leave the flag out, or start a new LoRA from a full checkpoint."
            )
        logger.info("The LoRA keeps its %s %s (not --%s %s).", key, kept, flag, given)


_LORA_FLAGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_bias": "bias"}


def compute_dtype(training_args: Any) -> torch.dtype:
    """The precision in which the step computes."""
    if training_args.bf16:
        return torch.bfloat16
    return torch.float16 if training_args.fp16 else torch.float32


def computing(training_args: Any) -> contextlib.AbstractContextManager:
    """The context of the step's precision, for forwards that no wrapper of the trainer has put into it."""
    dtype = compute_dtype(training_args)
    if dtype == torch.float32:  # which older releases of torch refuse on a CPU, even when it is not enabled
        return contextlib.nullcontext()
    return torch.autocast(training_args.device.type, dtype=dtype)


def student_dtype(training_args: Any) -> torch.dtype:
    """The precision in which the student's weights are held.

    DeepSpeed keeps fp32 master copies itself, and LoRA leaves the base frozen; without either, weights that are
    trained stay in fp32 and autocast does the rest (AdamW on bf16 weights loses small updates).
    """
    if training_args.deepspeed or training_args.lora_enable:
        return compute_dtype(training_args)
    return torch.float32


def describe_taf(config: Any, model_args: Any, teacher: Any = None) -> None:
    """Write into a student's config what its new TAF adapter is like.

    Args:
        teacher: the config of the teacher that P_T comes from; None where it comes from an earlier stage's adapter.

    Raises:
        ValueError: where there is neither.
    """
    from ..hosts.llava.loader import read_config

    if teacher is not None:
        entries = taf_config(teacher, model_args.taf_depth)
    else:
        folder = os.path.dirname(model_args.pretrain_mm_mlp_adapter or "")
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ValueError(
                "--mm_projector_type taf without a teacher needs --pretrain_mm_mlp_adapter from a DPT folder, beside "
                "its config.json; or give --teacher_model_path."
            )
        source = read_config(folder)
        entries = {name: getattr(source, name, None) for name in taf_config(config_stub())}
    for name, value in entries.items():
        setattr(config, name, value)


def config_stub() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(mm_projector_type="linear", hidden_size=0)


def _keep_vision(config: Any, model_args: Any) -> None:
    """A checkpoint goes on with the encoder, layer and adapter it was trained with, whatever the flags' defaults are:
    LLaVA would write the flags into the config and go on with the modules that are there."""
    for flag, key in _VISION_FLAGS.items():
        kept = getattr(config, key, None)
        if kept is None or kept == getattr(model_args, flag):
            continue
        logger.info("The student keeps its %s %s (not --%s %s).", key, kept, flag, getattr(model_args, flag))
        setattr(model_args, flag, kept)


_VISION_FLAGS = {
    "vision_tower": "mm_vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_patch_merge_type": "mm_patch_merge_type",
    "mm_projector_type": "mm_projector_type",
    "mm_use_im_start_end": "mm_use_im_start_end",
    "mm_use_im_patch_token": "mm_use_im_patch_token",
}


def _initialize_vision(core: nn.Module, model_args: Any, training_args: Any) -> None:
    import copy

    if model_args.unfreeze_mm_vision_tower and not has_own_tower(core.config):
        core.get_model().vision_tower = None  # a frozen one, if any: LLaVA builds it anew
        core.config.unfreeze_mm_vision_tower = True
    without_adapter = copy.copy(model_args)
    without_adapter.pretrain_mm_mlp_adapter = None  # loaded by us: weights only, and with errors that name the file
    # LLaVA asks for a length, which transformers 5 has made a bool; it keeps the tower out of FSDP's units.
    fsdp = ["fsdp"] if getattr(training_args, "fsdp", None) else None
    if fsdp:
        _hide_tower(core, model_args.model_name_or_path)
    core.get_model().initialize_vision_modules(model_args=without_adapter, fsdp=fsdp)
    # Weights that are saved, and may be trained, are held as the language model's.
    tower_dtype = (student_dtype if has_own_tower(core.config) else compute_dtype)(training_args)
    core.get_vision_tower().to(dtype=tower_dtype, device=training_args.device)
    core.config.mm_use_im_start_end = model_args.mm_use_im_start_end
    core.config.mm_use_im_patch_token = model_args.mm_use_im_patch_token


def _hide_tower(core: nn.Module, path: str) -> None:
    """A tower that came with a checkpoint, as LLaVA expects it under FSDP: in a list, so that it is no child.

    Raises:
        CheckpointError: when its weights have to be saved with the model's, which they would not be.
    """
    if has_own_tower(core.config):
        raise CheckpointError(
            f"--model_name_or_path {path} has an encoder of its own, which LLaVA keeps out of FSDP's units and so out "
            "of checkpoints: go on with DDP or DeepSpeed (leave --fsdp out)."
        )
    inner = core.get_model()
    tower = getattr(inner, "vision_tower", None)
    if isinstance(tower, nn.Module):
        del inner.vision_tower
        inner.vision_tower = [tower]


def _load_adapter(core: nn.Module, path: str) -> None:
    from ..hosts.llava.loader import load_extra_weights

    check_adapter_path(path)
    load_extra_weights(core, path)


def check_adapter_path(path: str) -> None:
    """Refuse what --pretrain_mm_mlp_adapter cannot be.

    Raises:
        CheckpointError: naming it.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path} is a folder: name the mm_projector.bin in it.")


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def add_lora(model: nn.Module, training_args: Any) -> nn.Module:
    """The model with a new LoRA on the linear layers of its language model."""
    from peft import LoraConfig, get_peft_model

    core = llava_core(model)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in core.named_modules()
        if isinstance(module, nn.Linear)
        and not any(part in name for part in ("mm_projector", "vision_tower", "lm_head"))
    }
    # A pattern, since bare names would also match the vision tower's layers.
    pattern = rf"model\.layers\..*\.({'|'.join(sorted(names))})"
    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=pattern,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def prepare_quantised(core: nn.Module, dtype: torch.dtype) -> None:
    """Ready a student with weights of 8 or 4 bits for LoRA, as LLaVA does: norms in fp32; encoder, adapter, embeddings
    and head, which are not quantised, in the precision of the step.

    Args:
        core: before LoRA is added, or the model inside it.
        dtype: in which the step computes.
    """
    from peft import prepare_model_for_kbit_training

    trained = {id(parameter) for parameter in core.parameters() if parameter.requires_grad}
    # It freezes everything and widens all that is not quantised. Checkpointing is switched on elsewhere.
    prepare_model_for_kbit_training(core, use_gradient_checkpointing=False)
    for parameter in core.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    modules = [core.get_input_embeddings(), core.get_output_embeddings(), core.get_vision_tower(), projector(core)]
    for module in modules:
        module.to(dtype)
