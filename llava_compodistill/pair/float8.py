"""Weights of 8 bits in floating point (--teacher_dtype float8), for the matrices of a frozen teacher's decoder layers.

A row of a matrix is held as float8 (e4m3: four bits of exponent, three of mantissa) and a power of two, by which its
greatest weight comes to lie between half the largest number of the format, 448, and that number. Such a scale costs no
precision, and the weight that a product then takes is exact in float32 and bfloat16: the teacher is the one whose
weights were rounded once. (The scales are those of OCP's microscaling formats, here one a row.) Products run in the
precision of the step on weights that are made for the call, so nothing but PyTorch is needed, and any device can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..hosts import host_of

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
#: 2 ** -24 is the smallest number that float16 has.
LEAST_EXPONENT = -24


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to float8, row by row.

    Args:
        weight: [outputs, inputs].

    Returns:
        (float8 [outputs, inputs], scales [outputs, 1], powers of two in the weight's precision): their product is the
        rounded matrix.
    """
    wide = weight.detach().float()
    fraction, exponent = torch.frexp(wide.abs().amax(dim=1, keepdim=True) / LARGEST)
    # Of an exact power of two the fraction is 1/2, and the exponent one too many.
    exponent = (exponent - (fraction == 0.5).to(exponent.dtype)).clamp(min=LEAST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(fraction), exponent)
    return (wide / scale).to(FLOAT8), scale.to(weight.dtype)


class Float8Linear(nn.Module):
    """A linear map whose weights are held in float8 and cannot be trained. Gradients pass through it to its input.

    Args:
        linear: the map whose place it takes; its bias is kept.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Parameters and not buffers: what moves a teacher's layers about moves parameters.
        weight, scale = quantise(linear.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight.to(self.scale.dtype) * self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def hold_in_float8(model: nn.Module) -> None:
    """Round the matrices of a frozen model's decoder layers to float8, in place and one by one. Embeddings, norms,
    head, adapter and encoder stay as they are.

    Do not cast the model afterwards: `model.to(dtype)` would take the weights for the numbers that they stand for.
    """
    for layer in host_of(model).decoder_layers(model):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Float8Linear(child))


def is_float8(model: nn.Module) -> bool:
    """Whether `hold_in_float8` has been here."""
    return any(isinstance(module, Float8Linear) for module in model.modules())
