"""Differences between logits, distilled in both directions (DBiLD of Switch-KD, arXiv 2604.14629, after BiLD,
arXiv 2406.13555), over rows of a language model's head and without the logits of all rows.

    DBiLD(z_T, z_S) = KL(p_S(I_T) || p_T(I_T)) + KL(p_S(I_S) || p_T(I_S))             summed over the rows

I_T are the k_T largest of the teacher's logits, I_S the k_S largest of the student's. p(I) is the softmax, at
temperature tau, of the differences z_i - z_j over the pairs i before j of I, in the order of the model that I is of.
Each row has its own k: the knee of its sorted logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..ops.answer_loss.head import Head, chunk_elements, rows_per_chunk, slices


class Differences(NamedTuple):
    """Which differences are compared.

    Attributes:
        temperature: tau > 0. No factor tau squared, as in BiLD's code.
        least, most: bounds of k, 3 <= least <= most. (Two logits have one difference, whose softmax is always 1.)
    """

    temperature: float = 3.0
    least: int = 4
    most: int = 64


_DEFAULTS = Differences()


def knee(ordered: torch.Tensor) -> torch.Tensor:
    """[R] int64: how many of a row's logits stand before the knee of their curve, the knee included (Kneedle).

    With ranks and logits brought to [0, 1], the curve runs from (0, 1) to (1, 0), below the chord between them where a
    few logits stand out; its knee is where it lies farthest below.

    Args:
        ordered: [R, C], each row in falling order, C >= 2.
    """
    first, last = ordered[:, :1], ordered[:, -1:]
    height = (ordered - last) / (first - last).clamp_min(torch.finfo(ordered.dtype).tiny)
    chord = torch.linspace(1, 0, ordered.shape[1], dtype=ordered.dtype, device=ordered.device)
    return (chord - height).argmax(dim=1) + 1


def dbild_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    options: Differences = _DEFAULTS,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """DBiLD(z_T, z_S) summed over R rows, with z = hidden weightᵀ + bias.

    Logits exist for a chunk of rows at a time, and gradients are made together with the loss: the backward pass needs
    no head (under ZeRO-3 its weights are gone by then). The knee is that of the `most` largest logits: over a whole
    vocabulary it lies at a rank of thousands, which have too many pairs.

    Args:
        student_hidden, teacher_hidden: [R, D_S] and [R, D_T], what reaches the heads at the same rows; R may be 0.
        student_weight, teacher_weight: [V_S, D_S] and [V_T, D_T]. No gradient reaches the teacher's side.
        student_bias, teacher_bias: [V_S], [V_T].
        vocab_size: of the real vocabulary, the first rows of both heads; by default the smaller of V_S and V_T.

    Returns a scalar in float32 (float64 stays); 0 with a graph where there are no rows.

    Raises:
        ValueError: for unlike numbers of rows, or options out of range.
    """
    if len(student_hidden) != len(teacher_hidden):
        rows = f"{len(student_hidden)} and {len(teacher_hidden)}"
        raise ValueError(f"Student and teacher must have the same rows, got {rows}.")
    if not options.temperature > 0 or not 3 <= options.least <= options.most:
        raise ValueError(f"temperature > 0 and 3 <= least <= most must hold, got {options}.")
    common = min(len(student_weight), len(teacher_weight))
    vocab = common if vocab_size is None else vocab_size
    teacher = [None if part is None else part.detach() for part in (teacher_hidden, teacher_weight, teacher_bias)]
    return _DBiLD.apply(student_hidden, student_weight, student_bias, *teacher, options, vocab)


class _DBiLD(torch.autograd.Function):
    """A row's gradient is 0 but at the logits that were selected: their places and gradients are kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, options, vocab):
        student, teacher = Head(hidden, weight, bias), Head(teacher_hidden, teacher_weight, teacher_bias)
        size = min(options.most, vocab)
        total = torch.zeros((), dtype=student.wide, device=hidden.device)
        places = torch.empty(len(hidden), 2 * size, dtype=torch.long, device=hidden.device)
        gradient = torch.zeros(places.shape, dtype=student.wide, device=hidden.device)
        grad_hidden = torch.zeros(hidden.shape, dtype=student.wide, device=hidden.device)
        ctx.chunk = _rows(weight, size)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in slices(len(hidden), ctx.chunk):
                mine, theirs = (head.logits(part, slice(0, vocab)).to(student.wide) for head in (student, teacher))
                led = [logits.topk(size, dim=1) for logits in (theirs, mine)]  # by the teacher, by the student
                counts = [knee(found.values).clamp(options.least, options.most) for found in led]
                places[part] = torch.cat([found.indices for found in led], dim=1)
                mine, theirs = mine.gather(1, places[part]), theirs.gather(1, places[part])
                with torch.enable_grad():
                    mine.requires_grad_()
                    loss = sum(
                        _divergence(*pair, count, options.temperature)
                        for *pair, count in zip(
                            mine.split(size, dim=1), theirs.split(size, dim=1), counts, strict=True
                        )
                    )
                    (gradient[part],) = torch.autograd.grad(loss, mine)
                total += loss.detach()
                if ctx.needs_input_grad[0]:
                    columns = student.weight[places[part]].to(student.wide)  # [rows, 2 size, D]
                    grad_hidden[part] = torch.einsum("rk,rkd->rd", gradient[part], columns)
        ctx.save_for_backward(hidden, places, gradient, grad_hidden)
        ctx.weight = weight.shape, weight.dtype
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        hidden, places, gradient, grad_hidden = ctx.saved_tensors
        for_weight = for_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                for_weight = _weight_gradient(hidden, places, gradient * grad_loss, ctx.chunk, *ctx.weight)
            if ctx.needs_input_grad[2]:
                shape, dtype = ctx.bias
                for_bias = gradient.new_zeros(shape).put_(places, gradient * grad_loss, accumulate=True).to(dtype)
            for_hidden = (grad_hidden * grad_loss).to(hidden.dtype)
        return for_hidden, for_weight, for_bias, *[None] * 5


def _divergence(mine: torch.Tensor, theirs: torch.Tensor, counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(p_S || p_T) of the differences, summed over the rows.

    Args:
        mine, theirs: [R, K] logits at the same tokens, in the order of the model that has selected them.
        counts: [R], how many of a row's K count.
    """
    first, second = torch.triu_indices(mine.shape[1], mine.shape[1], offset=1, device=mine.device)
    left_out = second >= counts[:, None]
    lowest = torch.finfo(mine.dtype).min / 4  # not -inf, whose differences are NaN

    def log_softmax(logits: torch.Tensor) -> torch.Tensor:
        differences = (logits[:, first] - logits[:, second]) / temperature
        return F.log_softmax(differences.masked_fill(left_out, lowest), dim=1)

    student, teacher = log_softmax(mine), log_softmax(theirs)
    return (student.exp() * (student - teacher)).sum()


def _weight_gradient(
    hidden: torch.Tensor,
    places: torch.Tensor,
    gradient: torch.Tensor,
    chunk: int,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[V, D]: each row's hidden state times its gradient, at the rows of the weight that were selected; summed in the
    gradient's precision and rounded once, without a copy of the whole weight in it."""
    used, place = places.unique(return_inverse=True)
    total = gradient.new_zeros(len(used), hidden.shape[1])
    for part in slices(len(hidden), chunk):
        of_rows = gradient.new_zeros(len(hidden[part]), len(used))
        of_rows.scatter_add_(1, place[part], gradient[part])
        total.addmm_(of_rows.t(), hidden[part].to(gradient.dtype))
    result = torch.zeros(shape, dtype=dtype, device=hidden.device)
    result[used] = total.to(dtype)
    return result


def _rows(weight: torch.Tensor, size: int) -> int:
    """Rows of a chunk: neither its logits, nor its pairs, nor the rows of the weight at its selected logits are more
    than fits the memory meant for them."""
    widest = max(size * (size - 1) // 2, 2 * size * weight.shape[1])
    return max(1, min(rows_per_chunk(weight), chunk_elements(weight.device) // widest))
