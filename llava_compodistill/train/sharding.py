"""FSDP2 and DeepSpeed: each rank holds a part of every weight. What is saved is whole, and loads in LLaVA."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from .. import compat
from ..errors import FlagError
from ..pair.student import student_dtype


def check_fsdp(args: Any) -> None:
    """Refuse what FSDP cannot do here, before anything is loaded.

    Raises:
        FlagError: naming the flag and the way out.
    """
    if not args.fsdp:
        return
    version, missing = compat.fsdp_version(args)
    if version != 2:
        raise FlagError(
            f"--fsdp: this is the first FSDP ({missing}), whose runs and checkpoints are not supported. Train without "
            "--fsdp, with LAUNCHER=deepspeed and DEEPSPEED_CONFIG=zero3.json for less memory; or use FSDP2."
        )
    kind = args.fsdp_config.get("state_dict_type", "FULL_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise FlagError(
            f"--fsdp_config: state_dict_type {kind} would save the weights in parts, which LLaVA cannot load. Leave "
            "the entry out."
        )


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight with all ranks' parts. All ranks have to call it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def gather_weights(model: nn.Module, trained_alone: bool) -> dict[str, torch.Tensor]:
    """The whole weights by name, on the CPU of the first rank; empty on the others. All ranks have to call it.

    Args:
        trained_alone: leave out the frozen ones.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_alone)
    return get_model_state_dict(model, options=options)


@contextlib.contextmanager
def without_second_weights() -> Iterator[None]:
    """Inside, a checkpoint gets the weights once: transformers would put FSDP's whole model, frozen parts included,
    beside what `checkpoint.save` writes, in a file that nothing here reads."""
    module = transformers.trainer
    function = getattr(module, "save_fsdp_model", None)
    if function is not None:
        module.save_fsdp_model = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if function is not None:
            module.save_fsdp_model = function


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed
# ---------------------------------------------------------------------------------------------------------------------
def prepare(trainer: transformers.Trainer) -> None:
    """After a trainer is made: what FSDP and DeepSpeed need of it.

    Raises:
        FlagError: where accelerate trains without the FSDP that was asked for, which it does in silence.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise FlagError(
            "--fsdp: accelerate does not start it here: it takes several processes, on GPUs. Leave the flag out."
        )
    _prepare_deepspeed(trainer)


def _prepare_deepspeed(trainer: transformers.Trainer) -> None:
    """Let transformers 4.37 and its accelerate run with a current DeepSpeed. Remove when 4.37 goes.

    What `"auto"` stands for in ZeRO-3's config becomes a whole number (4.37 fills in a fraction, which is refused).
    DeepSpeed alone counts micro-batches (accelerate would ask it not to synchronise between them, which it refuses).
    """
    if trainer.is_deepspeed_enabled and not compat.hands_out_windows(trainer):
        trainer.accelerator.no_sync = lambda model: contextlib.nullcontext()
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    config = getattr(plugin, "hf_ds_config", None)
    zero = {} if config is None else config.config.get("zero_optimization", {})
    if zero.get("stage3_prefetch_bucket_size") == "auto":
        zero["stage3_prefetch_bucket_size"] = int(0.9 * trainer.model.config.hidden_size**2)


def hold_alike(model: nn.Module, args: Any) -> None:
    """Under ZeRO-3, hold what is new in the precision that the run computes in, as the loaded weights are held: an
    adapter, LoRA and terms' own weights. ZeRO-1 and -2 do this themselves; all keep copies in fp32 to train."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None or not config.is_zero3():
        return
    dtype = student_dtype(args)
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def resuming_lora(model: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed's checkpoint of a LoRA loads although it has no frozen weights: transformers 4.37 leaves them
    out, and then asks for them. Remove when 4.37 goes."""
    module = transformers.trainer
    original = module.deepspeed_load_checkpoint
    if not hasattr(model, "peft_config") or "load_module_strict" in inspect.signature(original).parameters:
        yield
        return

    def load(engine: Any, path: str) -> None:
        engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_module_strict=False)
        try:
            original(engine, path)
        finally:
            del engine.load_checkpoint

    module.deepspeed_load_checkpoint = load
    try:
        yield
    finally:
        module.deepspeed_load_checkpoint = original
