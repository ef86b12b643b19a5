"""The frozen teacher.

It never becomes a submodule of the student, so it is in no state dict and no optimizer.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from .. import compat
from ..errors import CheckpointError
from ..hosts.llava import register
from ..hosts.llava.quantization import quantization_config, refuse_without_bitsandbytes
from .float8 import hold_in_float8
from .placement import QUANTISED


def load_teacher(
    path: str,
    base: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    vision_tower: str | None = None,
    placement: str = "replicate",
    float8: bool = False,
) -> nn.Module:
    """Load a teacher: frozen, in eval mode, in its own precision, whole on one device whatever DeepSpeed does to the
    student.

    Args:
        path: a LLaVA checkpoint (full, LoRA or adapter); `base` names the language model of the latter two.
        vision_tower: where the encoder is found now, if its path has changed since the teacher was trained.
        placement: where it is to live (`placement.PLACEMENTS`). 8bit and 4bit are loaded so; the others are loaded on
            the CPU, for `placement.place_teacher`, but replicate on `device`.
        float8: whether the matrices of its layers are held in 8 bits (`float8`); `dtype` is what it computes in.

    Raises:
        CheckpointError: when the folder is no usable LLaVA checkpoint, or a LoRA is to be quantised.
        FlagError: for 8 or 4 bits where they cannot be loaded.
    """
    register()
    from ..hosts import load_model
    from ..hosts.llava.loader import checkpoint_kind

    check_teacher(path)
    options = compat.dtype_argument(dtype)
    quantised = placement in QUANTISED
    if quantised:
        flag = f"--teacher_placement {placement}"
        refuse_without_bitsandbytes(flag, device)
        if os.path.isdir(path) and checkpoint_kind(path) != "full":
            raise CheckpointError(
                f"{flag}: {path} is no whole model, and LoRA weights are lost in part when they are merged into "
                "quantised ones. Merge it first: llava-compodistill merge CHECKPOINT OUTPUT."
            )
        options["quantization_config"] = quantization_config(QUANTISED[placement], dtype or torch.float16)
        options["device_map"] = {"": device}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with compat.outside_zero3():
        teacher = load_model(path, base, vision_tower=vision_tower, **options)
        tower = teacher.get_vision_tower()
        tower.load_model()
    teacher.config.use_cache = False
    teacher.requires_grad_(False)
    if quantised:  # its layers stay as they are, where they are
        tower.to(device=device, dtype=dtype)
        return teacher.eval()
    if float8:  # where it was loaded: the device never holds the whole weights
        hold_in_float8(teacher.to(dtype=dtype))
        dtype = None
    return teacher.to(device=device if placement == "replicate" else "cpu", dtype=dtype).eval()


def check_teacher(path: str) -> None:
    """Refuse a folder that holds no LLaVA model.

    Raises:
        CheckpointError: naming it.
    """
    from ..hosts.llava.loader import checkpoint_kind

    if os.path.isdir(path) and checkpoint_kind(path) == "base":
        raise CheckpointError(
            f"--teacher_model_path {path} is a language model without vision: give a LLaVA checkpoint."
        )
