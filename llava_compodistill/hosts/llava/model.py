"""Where things are in a LLaVA model."""

from __future__ import annotations

import torch
from torch import nn


def llava_core(model: nn.Module) -> nn.Module:
    """The LLaVA causal language model inside any wrapper (DDP, DeepSpeed, PEFT)."""
    for module in model.modules():
        # Asked of the class: wrappers such as PeftModel pass attributes of what they wrap off as their own.
        if hasattr(type(module), "prepare_inputs_labels_for_multimodal"):
            return module
    raise TypeError(f"{type(model).__name__} holds no LLaVA model.")


def projector(model: nn.Module) -> nn.Module:
    """The adapter from visual features to visual tokens."""
    return llava_core(model).get_model().mm_projector


def project(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """[B, N_v, D_v] -> [B, N_v, D], minding that encoder and adapter may differ in precision."""
    weight = next(projector(model).parameters(), None)
    return projector(model)(features if weight is None else features.to(weight.dtype))
