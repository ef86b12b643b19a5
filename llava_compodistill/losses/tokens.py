"""Logit distillation (L_KL, paper Section 4) as a pure function of whole sequences' logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import wide

IGNORE_INDEX = -100


def logit_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """L_KL on the logits of whole sequences: mean KL(p_T || p_S) over the positions that predict an answer token.

    The readable reference of ``ops.answer_loss`` (which returns sums over selected rows). The causal shift is applied
    here: the logits at position i predict the label at i + 1. With temperature T the term carries T**2.

    Args:
        student_logits, teacher_logits: [B, N, V_S] and [B, N, V_T]. No gradient reaches the teacher's.
        labels: [B, N] int64, ``IGNORE_INDEX`` where nothing is to be predicted.
        temperature: T > 0.
        vocab_size: common vocabulary, over which both are renormalised; the smaller of V_S and V_T by default.

    Returns a scalar in nats; 0 with a graph where no position predicts an answer.
    """
    common = min(student_logits.shape[-1], teacher_logits.shape[-1])
    if student_logits.shape[:2] != labels.shape or teacher_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits must be [B, N, V] for labels {list(labels.shape)}, got {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}"
        )
    if vocab_size is not None and not 1 <= vocab_size <= common:
        raise ValueError(f"vocab_size must lie in [1, {common}], the columns both models have, got {vocab_size}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    common = common if vocab_size is None else vocab_size
    samples, positions, targets = answer_rows(labels)
    student = wide(student_logits[samples, positions, :common]) / temperature
    teacher = wide(teacher_logits.detach()[samples, positions, :common]) / temperature
    divergence = F.kl_div(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="sum", log_target=True
    )
    return divergence * temperature**2 / max(len(targets), 1)


def answer_rows(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where an answer token is predicted: (batch_index, row_index, target), [R] int64 each, in reading order.

    Position i of a sample is one when the label at i + 1 is not ``IGNORE_INDEX``; that label is its target. The label
    at position 0 is predicted by nothing and the last position predicts nothing. ``labels`` is [B, N].
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must be [B, N], got {list(labels.shape)}")
    batch_index, row_index = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return batch_index, row_index, labels[batch_index, row_index + 1]
