"""What functions over chunks of a head's rows share: the head in the precision of its product, the size of a chunk,
and gradients that are made in the forward pass and handed out in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

# Logits of a chunk; about four buffers of that size, in 4 bytes, live at a time.
CHUNK_ELEMENTS = {"cpu": 1 << 21}
DEFAULT_CHUNK_ELEMENTS = 1 << 25
# float16 loses what is below 6e-8: gradients of logits and hidden states are kept times a power of two, at most this.
FLOAT16_SCALE = 1024.0
# torch.mm(..., out_dtype=torch.float32) for 16-bit operands: CUDA only, PyTorch 2.8 and later.
_HAS_WIDE_MM = "dtype" in torch.ops.aten.mm.overloads()


def rows_per_chunk(weight: torch.Tensor) -> int:
    """Rows of logits that fit the memory meant for them, at least 32: fewer would leave the matrix units idle."""
    return max(32, chunk_elements(weight.device) // max(weight.shape[0], 1) // 32 * 32)


def chunk_elements(device: torch.device) -> int:
    """Elements that one buffer of a chunk may have."""
    return CHUNK_ELEMENTS.get(device.type, DEFAULT_CHUNK_ELEMENTS)


class Head:
    """A language-model head and its input in the dtype of the product."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        self.dtype = _compute_dtype(hidden, weight)
        self.weight_dtype = weight.dtype
        self.hidden, self.weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def logits(self, rows: slice, vocab: slice = slice(None)) -> torch.Tensor:
        """[rows, vocab], in the dtype of the product."""
        return F.linear(self.hidden[rows], self.weight[vocab], None if self.bias is None else self.bias[vocab])


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What the product of a plain head would run in here: autocast's dtype inside autocast."""
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and hidden.dtype != torch.float64:
        return dtype
    return torch.promote_types(hidden.dtype, weight.dtype)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision of products on a kind of device inside autocast; None outside."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cpu":  # before PyTorch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, float32 for 16-bit operands."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and _HAS_WIDE_MM:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    return left.to(wide) @ right.to(wide)


def check_model(name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden states must be [R, D] and the head [V, D], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    for part in (hidden, weight, bias):
        if part is not None and not part.dtype.is_floating_point:
            raise TypeError(f"{name}: hidden states, head and bias must be floating point, got {part.dtype}")


def check_labels(labels: torch.Tensor, rows: int, vocab: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must be [R] = [{rows}], got {list(labels.shape)}")
    if labels.device.type == "cpu" and rows:
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"labels must lie in [0, {vocab}), got {low} to {high}; select the rows that predict an answer token "
                "before calling (losses.answer_rows)"
            )


def _finish(gradient: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    """gradient * factor, in place where it has the parameter's dtype; 16-bit ones a block at a time in float32."""
    if gradient is None:
        return None
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor).to(dtype)
    for block in slices(len(gradient), 4096):
        gradient[block] = gradient[block] * factor.view(*[1] * gradient.ndim)
    return gradient.to(dtype)


def hand_out(ctx: Any, name: str, grad_loss: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of hidden states, weight and bias that a forward pass has kept in `ctx.gradients`, those of the
    hidden states times `ctx.scale`, in their parameters' `ctx.dtypes`; once.

    Raises:
        RuntimeError: the second time.
    """
    if ctx.gradients is None:
        raise RuntimeError(
            f"{name} made its gradients in the forward pass and has handed them out: call it again for a second "
            "backward pass."
        )
    gradients, ctx.gradients = ctx.gradients, None
    factors = grad_loss / ctx.scale, grad_loss, grad_loss
    return list(map(_finish, gradients, factors, ctx.dtypes))
