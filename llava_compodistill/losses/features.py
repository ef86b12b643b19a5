"""Distances between features, token by token, once a trained map has brought them to one width."""

from __future__ import annotations

import torch

from .precision import wide

KINDS = ("mse", "cosine")


def feature_distance(mapped: torch.Tensor, target: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """[R]: the distance of each row to its target.

    Args:
        mapped, target: [R, D]. No gradient reaches the target.
        kind: "mse", the mean squared difference over D, or "cosine", 1 - cos.

    Raises:
        ValueError: for an unknown kind.
    """
    mapped, target = wide(mapped), wide(target.detach())
    if kind == "mse":
        return (mapped - target).square().mean(dim=-1)
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(mapped, target, dim=-1)
    raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
