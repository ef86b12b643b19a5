"""Where the weights of a frozen teacher live: on every device, in pieces on all of them, or in host memory.

Only the decoder layers are moved about. Embeddings, final norm, head and adapter stay whole on the device, since
losses read the head's weight outside the teacher's forward; the encoder is the student's where both share one. 8bit
and 4bit are loaded so (`load_teacher`) and stay where they were loaded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import FlagError
from ..hosts import host_of

logger = logging.getLogger(__name__)

#: What --teacher_placement takes.
PLACEMENTS = ("auto", "replicate", "zero3", "fsdp", "offload", "8bit", "4bit")
#: Placements that change the weights, and the bits that each leaves them.
QUANTISED = {"8bit": 8, "4bit": 4}
#: Placements in which every rank holds a part of each layer.
SHARDED = ("zero3", "fsdp")
#: The share of a device that weights, gradients and optimizer may take; the rest is left for activations.
SHARE = 0.75
#: Bytes of a trained parameter: its weight; its gradient and Adam's two moments. (With DeepSpeed, too: it keeps a copy
#: in half precision, and gradients in half precision.)
_WEIGHT, _STATES = 4, 12


@dataclass(frozen=True)
class Room:
    """What `choose` decides by, in bytes of one rank.

    Attributes:
        layers: the teacher's decoder layers.
        rest: its other weights.
        student: weights, gradients and optimizer state of the student.
        available: what the device has for all of them.
        ranks: processes that could share the layers.
    """

    layers: int
    rest: int
    student: int
    available: int
    ranks: int = 1


def choose(room: Room, sharded: str | None = None) -> tuple[str, str]:
    """The first of replicate, `sharded` and offload that leaves a quarter of the device free.

    Args:
        sharded: zero3 or fsdp, or None where neither can run.

    Returns:
        The placement, and the reason in words.
    """
    limit = SHARE * room.available
    whole = room.layers + room.rest + room.student
    part = room.layers / room.ranks + room.rest + room.student
    fits = {"replicate": whole <= limit}
    if sharded is not None and room.ranks > 1:
        fits[sharded] = part <= limit
    chosen = next((name for name, holds in fits.items() if holds), "offload")
    reason = (
        f"whole, it and the student's weights, gradients and optimizer state take {_gib(whole)} GiB of a device, and "
        f"at most {SHARE:.0%} of {_gib(room.available)} GiB should"
    )
    return chosen, reason


def student_bytes(model: nn.Module, zero_stage: int = 0, ranks: int = 1) -> int:
    """What training takes of one device beside activations.

    Args:
        zero_stage: how much of it DeepSpeed divides by the ranks (1 to 3; FSDP is 3).
    """
    trained = frozen = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count * parameter.element_size()
    weights = frozen + _WEIGHT * trained
    divided = {0: 0, 1: 8 * trained, 2: _STATES * trained}.get(zero_stage, _STATES * trained + weights)
    return int(weights + _STATES * trained - divided + divided / ranks)


def available_bytes(device: torch.device) -> int | None:
    """Device memory that this process has or could have, on the rank that has least; None where it is host memory.
    All ranks call it."""
    if device.type != "cuda":
        return None
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        least = torch.tensor(available, dtype=torch.long, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        available = int(least)
    return available


def place_teacher(teacher: nn.Module, placement: str, device: torch.device) -> Any:
    """Put a teacher where it is to stay, before its first forward. All ranks call it.

    Args:
        teacher: as `load_teacher` gives it, on the CPU unless `placement` is replicate, 8bit or 4bit.
        placement: one of PLACEMENTS but auto, see `decide`.
        device: where forwards run.

    Returns:
        What has to be kept as long as the teacher: DeepSpeed's engine; else None.

    Raises:
        FlagError: where the placement cannot run here.
    """
    if placement in QUANTISED:
        return None
    if placement == "replicate":
        teacher.to(device)
        return None
    host = host_of(teacher)
    core = host.core(teacher)
    backbone, layers = host.backbone(core), host.decoder_layers(core)
    with _apart(backbone, layers, hidden="layers"):
        teacher.to(device)
    if placement == "offload":
        _offload(layers, device)
        return None
    with _apart(backbone, layers, hidden="others"):
        return (_zero3 if placement == "zero3" else _fsdp)(backbone, layers, device)


def _offload(layers: list[nn.Module], device: torch.device) -> None:
    from accelerate import cpu_offload

    for layer in layers:
        weights = {name: weight.detach().to("cpu") for name, weight in layer.state_dict().items()}
        if device.type == "cuda":
            weights = {name: weight.pin_memory() for name, weight in weights.items()}
        cpu_offload(layer, device, state_dict=weights, preload_module_classes=[type(layer).__name__])


def _fsdp(backbone: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    shard = fully_shard()
    if shard is None or not torch.distributed.is_initialized():
        raise FlagError("--teacher_placement fsdp: needs torch 2.6 or newer and several processes (torchrun).")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        shard(layer, mesh=mesh, reshard_after_forward=True)
    shard(backbone, mesh=mesh)  # has no weights of its own here, and lets its layers share streams and gather ahead


def fully_shard() -> Any:
    """torch's FSDP2; None before torch 2.6."""
    return getattr(torch.distributed.fsdp, "fully_shard", None) if torch.distributed.is_available() else None


def _zero3(backbone: nn.Module, layers: list[nn.Module], device: torch.device) -> Any:
    import deepspeed

    dtype = next(layers[0].parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used by training alone
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=backbone, config=config)
    backbone.eval()
    return engine


@contextlib.contextmanager
def _apart(backbone: nn.Module, layers: list[nn.Module], hidden: str) -> Iterator[None]:
    """Inside, a backbone lacks its decoder layers, or everything else: what it lacks is not touched by what wraps or
    moves it.

    Args:
        hidden: layers or others.
    """
    children, own = dict(backbone._modules), dict(backbone._parameters)
    wanted = {id(layer) for layer in layers}
    for name, child in children.items():
        if (hidden == "layers") == any(id(module) in wanted for module in child.modules()):
            del backbone._modules[name]
    if hidden == "others":
        for name in own:
            del backbone._parameters[name]
    try:
        yield
    finally:
        backbone._modules.clear()
        backbone._modules.update(children)
        if hidden == "others":  # into the dictionary that is there now: DeepSpeed puts one of its own in its place
            backbone._parameters.update(own)


def weights_bytes(teacher: nn.Module) -> tuple[int, int]:
    """(bytes of the decoder layers, of all else but the encoder)."""
    host = host_of(teacher)
    core = host.core(teacher)
    layers = {id(p) for layer in host.decoder_layers(core) for p in layer.parameters()}
    sizes = {True: 0, False: 0}
    for name, parameter in core.named_parameters():
        if "vision_tower" not in name:
            sizes[id(parameter) in layers] += parameter.numel() * parameter.element_size()
    return sizes[True], sizes[False]


def decide(teacher: nn.Module, device: torch.device, student: int, ranks: int, sharded: str | None) -> tuple[str, str]:
    """What --teacher_placement auto stands for, and why. All ranks call it.

    Args:
        student: what `student_bytes` gives.
        sharded: the placement among SHARDED that could run; None where none can.
    """
    available = available_bytes(device)
    if available is None:
        return "replicate", "the device shares its memory with the host"
    return choose(Room(*weights_bytes(teacher), student, available, ranks), sharded)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
