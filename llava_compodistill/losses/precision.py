"""The precision that every loss computes in."""

from __future__ import annotations

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
