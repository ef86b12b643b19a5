"""Whether student and teacher see alike: one encoder or two, one adapter or two, pixels prepared for which of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .. import compat
from ..hosts.llava.model import has_own_tower, llava_core, projector
from ..hosts.llava.taf import TAFProjector


def same_tower(student: Any, teacher: Any) -> bool:
    """Whether the models of two configs see the same features: one encoder, the same layer and patches of it, and
    neither has trained it."""
    return not (has_own_tower(student) or has_own_tower(teacher)) and same_origin(student, teacher)


def same_origin(student: Any, teacher: Any) -> bool:
    """Whether the encoders of two configs are the same, or were before training."""

    def identity(config: Any) -> tuple:
        name = config.mm_vision_tower
        return (
            os.path.realpath(name) if os.path.isdir(name) else name,
            config.mm_vision_select_layer,
            getattr(config, "mm_vision_select_feature", "patch"),
        )

    return identity(student) == identity(teacher)


def check_taf(student: Any, teacher: Any) -> None:
    """Refuse TAF between the models of two configs that see other features. A student that trains its encoder starts
    from the teacher's, and P_T reads what becomes of it.

    Raises:
        ValueError: naming both towers.
    """
    if has_own_tower(teacher):
        raise ValueError(
            "TAF fetches the teacher's adapter, which reads the teacher's encoder, and the teacher has trained that "
            "(unfreeze_mm_vision_tower in its config.json): use --mm_projector_type mlp2x_gelu."
        )
    if not same_origin(student, teacher):
        raise ValueError(
            "TAF fetches the teacher's adapter, which reads the teacher's encoder: --vision_tower "
            f"{student.mm_vision_tower} (layer {student.mm_vision_select_layer}) is not the teacher's "
            f"{teacher.mm_vision_tower} (layer {teacher.mm_vision_select_layer})."
        )


def share_tower(student: nn.Module, teacher: nn.Module) -> None:
    """Let the teacher use the student's encoder, so that its weights are in memory once."""
    teacher.get_model().vision_tower = llava_core(student).get_vision_tower()


def has_adapter_of(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the student's TAF adapter was fetched from this very teacher. Under ZeRO-3 all ranks call it."""
    adapter = projector(student)
    if not isinstance(adapter, TAFProjector):
        return False
    theirs = projector(teacher).state_dict()
    with compat.gathered(list(adapter.teacher_adapter.parameters())):
        mine = adapter.teacher_adapter.state_dict()
        return mine.keys() == theirs.keys() and all(
            mine[name].shape == value.shape and torch.equal(mine[name].to(value), value)
            for name, value in theirs.items()
        )


#: What `renormalisation` gives for processors that normalise alike.
IDENTITY = ((1.0,) * 3, (0.0,) * 3)


def renormalisation(source: Any, target: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, shift) by channel that turn pixels normalised by one image processor into another's.

    x_source = (v - mean_s) / std_s and x_target = (v - mean_t) / std_t, so x_target = scale x_source + shift.
    """
    values = list(zip(source.image_mean, source.image_std, target.image_mean, target.image_std, strict=True))
    scale = tuple(std / other_std for _, std, _, other_std in values)
    shift = tuple((mean - other_mean) / other_std for mean, _, other_mean, other_std in values)
    return scale, shift
