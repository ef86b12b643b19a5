"""Relations between tokens, as LLaVA-KD distils them: Gram matrices of logits, without the logits.

The logits of N tokens are Y = H Wᵀ + b. Their Gram matrix is Y Yᵀ = H' (W'ᵀ W') H'ᵀ with H' = [H, 1] and W' = [W, b]:
a matrix of the hidden size stands in for N x V logits, which for 729 visual tokens and 152k words take 440 MB a
sample.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .precision import wide

#: Rows of a head's weight that are converted to float32 at once.
_CHUNK = 8192


def head_gram(weight: torch.Tensor, bias: torch.Tensor | None = None, vocab_size: int | None = None) -> torch.Tensor:
    """W'ᵀ W' of a head, [D, D] (with a bias [D + 1, D + 1]), in float32 (float64 stays); gradients reach the head.

    Args:
        weight: [V, D]; bias: [V].
        vocab_size: rows that count, the real vocabulary; all by default.
    """
    rows = slice(vocab_size)
    with _whole_precision(weight):
        gram = _Gram.apply(weight[rows])
        if bias is None:
            return gram
        weight, bias = wide(weight[rows]), wide(bias[rows])
        mixed = (bias @ weight)[:, None]
        return torch.cat([torch.cat([gram, mixed], dim=1), torch.cat([mixed.t(), (bias @ bias).view(1, 1)], dim=1)])


def _whole_precision(tensor: torch.Tensor) -> torch.autocast:
    """Outside of autocast, under which matrix products would be those of half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Gram(torch.autograd.Function):
    """Wᵀ W, some rows at a time: neither pass holds a float32 copy of the whole head."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        total = None
        for rows in weight.split(_CHUNK):
            part = wide(rows).t() @ wide(rows)
            total = part if total is None else total.add_(part)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        both = grad + grad.t()
        gradient = torch.empty_like(weight)
        for rows, part in zip(weight.split(_CHUNK), gradient.split(_CHUNK), strict=True):
            part.copy_(wide(rows) @ both)
        return gradient


def relation_loss(
    student_hidden: torch.Tensor, student_gram: torch.Tensor, teacher_hidden: torch.Tensor, teacher_gram: torch.Tensor
) -> torch.Tensor:
    """1 - cos(vec(Y_S Y_Sᵀ), vec(Y_T Y_Tᵀ)) of the logits Y of a sample's N tokens (LLaVA-KD, relation distillation).

    Args:
        student_hidden, teacher_hidden: [N, D_S] and [N, D_T], what reaches the heads. No gradient reaches the teacher.
        student_gram, teacher_gram: of `head_gram`.

    Returns a scalar in float32 (float64 stays); 1 when a matrix is 0.
    """
    with _whole_precision(student_hidden):
        student = _gram_of_logits(student_hidden, student_gram)
        teacher = _gram_of_logits(teacher_hidden.detach(), teacher_gram.detach())
    return 1 - torch.nn.functional.cosine_similarity(student.flatten(), teacher.flatten(), dim=0)


def _gram_of_logits(hidden: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """[N, N], divided by its largest entry, which a cosine does not depend on: the squares stay in range."""
    hidden = wide(hidden)
    if gram.shape[0] == hidden.shape[1] + 1:
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
    relation = hidden @ gram.to(hidden.dtype) @ hidden.t()
    largest = relation.detach().abs().amax()
    return relation / torch.where(largest > 0, largest, 1.0)
