"""Cross-entropy and logit distillation on the answer rows, without the logits of the whole sequence.

    logits_s = student_hidden @ student_head_weight.T + student_bias                     # [R, V_S]
    logits_t = teacher_hidden @ teacher_head_weight.T + teacher_bias                     # [R, V_T]
    lm       = cross_entropy(logits_s, labels, reduction="sum")
    kl       = T**2 * sum KL(softmax(logits_t[:, :V] / T) || softmax(logits_s[:, :V] / T))
    loss     = lm_weight * lm + kl_weight * kl

With ``kl_row_weights`` [R] each row's divergence enters the sum times its weight. A teacher may be given as its k
likeliest tokens at each row and the mass of the rest (``top_tokens``), in place of its hidden states and head.

R counts the positions that predict an answer token, already selected and shifted (``losses.answer_rows``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .chunked import AnswerLossFunction, Options
from .head import check_labels, check_model, rows_per_chunk
from .top_tokens import TopTokens, check_top_tokens


class AnswerLoss(NamedTuple):
    """Scalars, float32 (float64 when the student's inputs are): SUMS over the rows, in nats.

    Attributes:
        loss: the weighted sum of both; the only one that gradients come from.
        lm: the cross-entropy, detached.
        kl: the divergence times T**2, each row's times its weight, detached; 0 without a teacher.
    """

    loss: torch.Tensor
    lm: torch.Tensor
    kl: torch.Tensor


def answer_loss(
    student_hidden: torch.Tensor,
    student_head_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head_weight: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    lm_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    kl_row_weights: torch.Tensor | None = None,
    teacher_top: TopTokens | None = None,
    chunk_rows: int | None = None,
) -> AnswerLoss:
    """Sums over R rows of the cross-entropy and of the KL divergence teacher || student (Section 4, L_LM and L_KL).

    The caller divides by the number of rows (over accumulation steps and ranks); the weights are given here because
    the gradients are made together with the loss, chunk by chunk, while a chunk's logits are at hand. The backward
    pass only scales them, and needs neither head nor hidden states. A frozen head (``requires_grad=False``) gets no
    gradient computed; the teacher never does.

    Args:
        student_hidden: [R, D_S] last hidden states at the answer rows; R may be 0.
        student_head_weight: [V_S, D_S]. (Under ZeRO-3 the caller gathers it for the forward pass.)
        labels: [R] int64 in [0, V_S), the token each row predicts: no -100 here. (The range is checked on a CPU only:
            elsewhere it would wait for the device.)
        teacher_hidden, teacher_head_weight: [R, D_T] and [V_T, D_T]; without them kl is 0.
        student_bias, teacher_bias: [V_S], [V_T].
        lm_weight, kl_weight: factors of the two sums in the loss.
        temperature: T > 0; the divergence is multiplied by T**2.
        vocab_size: common vocabulary of the divergence, over which both models are renormalised; at most (and by
            default) the smaller of V_S and V_T. Give the tokenizer's size where embedding rows are padded. The
            cross-entropy runs over the student's full vocabulary.
        kl_row_weights: [R] floating point, what each row's divergence counts (1 without them); no gradient reaches
            them.
        teacher_top: of R rows, in place of teacher_hidden and teacher_head_weight. It has to be made at this
            temperature and over this common vocabulary.
        chunk_rows: rows whose logits exist at a time; by default as many as fit a fixed amount of memory.

    Returns:
        An ``AnswerLoss``. Logits are computed in the inputs' dtype (autocast's inside autocast, hidden states and head
        promoted to one dtype otherwise), as a model's own head does; softmax and sums in float32.

    Raises ``ValueError`` or ``TypeError`` with the value received and the values allowed.
    """
    with_teacher = teacher_hidden is not None
    if with_teacher != (teacher_head_weight is not None):
        raise ValueError("teacher_hidden and teacher_head_weight must be given together")
    if with_teacher and teacher_top is not None:
        raise ValueError("teacher_top stands for teacher_hidden and teacher_head_weight: give one or the other")
    check_model("student", student_hidden, student_head_weight, student_bias)
    rows, student_vocab = student_hidden.shape[0], student_head_weight.shape[0]
    common = student_vocab
    if with_teacher:
        check_model("teacher", teacher_hidden, teacher_head_weight, teacher_bias)
        common = min(student_vocab, teacher_head_weight.shape[0])
        if teacher_hidden.shape[0] != rows:
            raise ValueError(f"student and teacher must have the same rows, got {rows} and {teacher_hidden.shape[0]}")
    if vocab_size is not None:
        if not 1 <= vocab_size <= common:
            raise ValueError(f"vocab_size must lie in [1, {common}], the rows both heads have, got {vocab_size}")
        common = vocab_size
    if teacher_top is not None:
        check_top_tokens(teacher_top, rows, common)
        teacher_top = TopTokens(*(part.detach() for part in teacher_top))
    if kl_row_weights is not None:
        _check_row_weights(kl_row_weights, rows, with_teacher or teacher_top is not None)
        kl_row_weights = kl_row_weights.detach()
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(student_head_weight)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    check_labels(labels, rows, student_vocab)
    if with_teacher:
        teacher_hidden, teacher_head_weight = teacher_hidden.detach(), teacher_head_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    trained = [
        part is not None and part.requires_grad and torch.is_grad_enabled()
        for part in (student_hidden, student_head_weight, student_bias)
    ]
    options = Options(
        float(lm_weight), float(kl_weight), float(temperature), common, chunk_rows, *trained, teacher_top
    )
    return AnswerLoss(
        *AnswerLossFunction.apply(
            student_hidden,
            student_head_weight,
            student_bias,
            labels,
            teacher_hidden,
            teacher_head_weight,
            teacher_bias,
            kl_row_weights,
            options,
        )
    )


def _check_row_weights(weights: torch.Tensor, rows: int, with_teacher: bool) -> None:
    if not with_teacher:
        raise ValueError("kl_row_weights weigh the divergence from a teacher: give teacher_hidden or teacher_top, too")
    if weights.shape != (rows,) or not weights.dtype.is_floating_point:
        raise ValueError(
            f"kl_row_weights must be floating point [R] = [{rows}], got {weights.dtype} {list(weights.shape)}"
        )
