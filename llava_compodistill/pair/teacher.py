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


def load_teacher(
    path: str,
    base: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    vision_tower: str | None = None,
) -> nn.Module:
    """Load a teacher: frozen, in eval mode, in its own precision, on one device whatever DeepSpeed does to the
    student.

    Args:
        path: a LLaVA checkpoint (full, LoRA or adapter); `base` names the language model of the latter two.
        vision_tower: where the encoder is found now, if its path has changed since the teacher was trained.

    Raises:
        CheckpointError: when the folder is no usable LLaVA checkpoint.
    """
    register()
    from ..hosts import load_model

    check_teacher(path)
    options = compat.dtype_argument(dtype)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with compat.outside_zero3():
        teacher = load_model(path, base, vision_tower=vision_tower, **options)
        teacher.get_vision_tower().load_model()
    teacher.config.use_cache = False
    teacher.requires_grad_(False)
    return teacher.to(device=device, dtype=dtype).eval()


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
