"""The distance of two next-token distributions over unlike vocabularies, without the logits of all rows.

Universal Logit Distillation (Boizard et al., arXiv 2402.12030) compares probabilities by rank, not by token:

    p_s = softmax(student_hidden @ student_head_weight.T / T)            # [R, V_S], over the real vocabulary
    p_t = softmax(teacher_hidden @ teacher_head_weight.T / T)            # [R, V_T]
    loss = sum |sort(p_s) - sort(p_t)|                                   # descending, the shorter one padded with 0

With g the derivative by p_s, which is the sign of the difference brought back to the tokens' order,

    d loss / d logits_s = p_s * (g - sum_v g p_s) / T

Gradients are made in the forward pass, chunk by chunk, as `answer_loss` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .head import FLOAT16_SCALE, Head, hand_out, rows_per_chunk, slices, wide_product


class _Options(NamedTuple):
    temperature: float
    vocab: tuple[int, int]
    chunk_rows: int
    train_hidden: bool
    train_weight: bool
    train_bias: bool


def uld_loss(
    student_hidden: torch.Tensor,
    student_head_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head_weight: torch.Tensor,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_sizes: tuple[int | None, int | None] = (None, None),
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """The SUM over R rows of the L1 distance between both models' sorted probabilities; between 0 and 2 a row.

    Args:
        student_hidden: [R, D_S], and row by row what corresponds of the teacher: teacher_hidden [R, D_T]; R may be 0.
        student_head_weight, teacher_head_weight: [V_S, D_S], [V_T, D_T]. Gradients reach the student's alone.
        student_bias, teacher_bias: [V_S], [V_T].
        temperature: T > 0 of both softmaxes. The sum carries no T squared: that belongs to the divergence, whose
            gradient falls with it.
        vocab_sizes: the real vocabularies, (student's, teacher's), where embedding rows are padded.
        chunk_rows: rows whose logits exist at a time; by default as many as fit a fixed amount of memory.

    Returns:
        Scalar, float32 (float64 where the student's inputs are). Products run in the inputs' or autocast's dtype, the
        rest in float32. The gradient of a 16-bit head is summed in float32, which takes twice its memory meanwhile.

    Raises ``ValueError`` with the value received and the values allowed.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"student and teacher must have the same rows, got {len(student_hidden)} and {len(teacher_hidden)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    heads = student_head_weight, teacher_head_weight
    vocab = tuple(len(head) if size is None else size for head, size in zip(heads, vocab_sizes, strict=True))
    for size, head in zip(vocab, heads, strict=True):
        if not 1 <= size <= len(head):
            raise ValueError(f"vocab_sizes must lie in [1, {len(head)}], the rows that the head has, got {size}")
    if chunk_rows is None:
        # Sorting takes twice the buffers that the divergence does.
        chunk_rows = max(16, min(map(rows_per_chunk, heads)) // 2)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    trained = [
        part is not None and part.requires_grad and torch.is_grad_enabled()
        for part in (student_hidden, student_head_weight, student_bias)
    ]
    options = _Options(float(temperature), vocab, chunk_rows, *trained)
    theirs = [None if part is None else part.detach() for part in (teacher_hidden, teacher_head_weight, teacher_bias)]
    return _ULD.apply(student_hidden, student_head_weight, student_bias, *theirs, options)


class _ULD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, options):
        student, teacher = Head(hidden, weight, bias), Head(teacher_hidden, teacher_weight, teacher_bias)
        wide, vocab = student.wide, slice(options.vocab[0])
        # Gradients of logits are below 2.
        scale = FLOAT16_SCALE if student.dtype == torch.float16 else 1.0
        zeros = student.weight.new_zeros
        total = zeros((), dtype=wide)
        grad_hidden = torch.empty_like(student.hidden) if options.train_hidden else None
        grad_weight = zeros(weight.shape, dtype=wide) if options.train_weight else None
        grad_bias = zeros(len(weight), dtype=wide) if options.train_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in slices(len(hidden), options.chunk_rows):
                mine = _probabilities(student, part, options.vocab[0], options.temperature, wide)
                theirs = _probabilities(teacher, part, options.vocab[1], options.temperature, wide)
                # 16-bit logits of a large vocabulary have many ties: stable, so that one run is like the other.
                ranked, order = mine.sort(dim=1, descending=True, stable=True)
                difference = F.pad(ranked, (0, max(0, theirs.shape[1] - ranked.shape[1])))
                difference[:, : theirs.shape[1]] -= theirs.sort(dim=1, descending=True).values
                total += difference.abs().sum()
                if not any(options[-3:]):
                    continue
                grad = torch.empty_like(mine).scatter_(1, order, difference[:, : mine.shape[1]].sign_())
                grad -= (grad * mine).sum(dim=1, keepdim=True)
                grad = grad.mul_(mine).div_(options.temperature)
                if grad_bias is not None:
                    grad_bias[vocab] += grad.sum(dim=0)
                grad = grad.mul_(scale).to(student.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, student.weight[vocab], out=grad_hidden[part])
                if grad_weight is not None:
                    for block in slices(options.vocab[0], 16384):
                        grad_weight[block] += wide_product(grad[:, block].t(), student.hidden[part]).div_(scale)
        ctx.gradients, ctx.scale = (grad_hidden, grad_weight, grad_bias), scale
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return *hand_out(ctx, "uld_loss", grad_loss), *[None] * 4


def _probabilities(head: Head, rows: slice, vocab: int, temperature: float, wide: torch.dtype) -> torch.Tensor:
    """[rows, vocab], in `wide`."""
    return torch.softmax(head.logits(rows, slice(vocab)).to(wide) / temperature, dim=1)
