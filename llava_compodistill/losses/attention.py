"""Attention distillation (L_ADL, paper Section 4) as a pure function of two maps.

Inputs of any floating-point dtype are computed in float32 (float64 stays float64), and so are the results. Nothing
here knows of a model; which rows count is decided by the caller and given as masks.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from .precision import wide

KINDS = ("cosine", "mse", "kl")
SIMILARITIES = ("row", "matrix")
REDUCTIONS = ("mean", "none")


def attention_distillation_loss(
    student_map: torch.Tensor,
    teacher_map: torch.Tensor,
    row_mask: torch.Tensor,
    kind: str = "cosine",
    similarity: str = "row",
    *,
    column_mask: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Distance between the visual attention maps of one student layer and its target: one summand of L_ADL.

    L_ADL (paper, Section 4, visual attention alignment) is the mean over the student's layers of the value returned
    here with the defaults: 1 - cos of each query's row over the visual keys, averaged over the rows that count, then
    over the samples that hold at least one such row.

    Args:
        student_map: [B, N, N_v] head means, or [B, H, N, N_v] to compare head by head (averaged over heads). Columns
            that pad a sample's visual tokens hold 0 in both maps.
        teacher_map: same shape: the mean map of the teacher layers matched to this layer. No gradient reaches it.
        row_mask: [B, N] bool, the query rows that count: real tokens that see at least one visual key.
        kind: "cosine"; "mse", the mean squared difference over the visual keys; "kl", KL(teacher || student) in nats
            with both rows renormalised over the visual keys (Table 3a).
        similarity: for the cosine, "row" as above or "matrix": a sample's counted rows flattened to one vector. The
            mean squared difference is the same either way; "kl" has rows only.
        column_mask: [B, N_v] bool, the real visual keys. Only "mse" needs it where samples differ in N_v; given, it
            also keeps samples without any visual key from counting.
        row_weights: [B, N] floating point, at least 0: the mean over a sample's counted rows is weighted by them. A
            row of weight 0 does not count. Not for the flattened matrix, which has no rows.
        reduction: "mean", or "none" for one loss per sample, [B], 0 where a sample does not count (divide their sum
            by the number of counting samples over all steps and ranks: ``counting_samples``).

    Returns:
        A scalar, or [B]. Without any counting sample it is 0 and still has a graph. A counted row that is 0 everywhere
        has similarity 0 (cosine) and no gradient of infinite size.

    Raises ``ValueError`` with the value received and the values allowed.
    """
    _check(student_map, teacher_map, row_mask, column_mask, kind, similarity, reduction)
    if row_weights is not None:
        _check_weights(row_weights, row_mask, kind, similarity)
        row_mask = row_mask & (row_weights > 0)
    student, teacher, rows = _prepare(student_map, teacher_map, row_mask, column_mask)
    if row_weights is not None:
        rows = row_weights.to(student.dtype).masked_fill(~row_mask, 0.0).unsqueeze(1)
    if kind == "cosine":
        per_sample = _cosine(student, teacher, rows, similarity)
        per_sample = counting_samples(row_mask, column_mask).to(per_sample.dtype) - per_sample
    elif kind == "mse":
        squared = (student - teacher).square().sum(dim=-1)
        if column_mask is None:
            columns = student.new_full((len(student), 1, 1), student.shape[-1])
        else:
            columns = column_mask.sum(dim=1).view(-1, 1, 1).to(student.dtype)
        per_sample = _mean_over_rows(squared / columns.clamp(min=1), rows)
    else:
        per_sample = _mean_over_rows(_row_divergence(student, teacher), rows)
    return _reduce(per_sample, row_mask, column_mask, reduction)


def attention_similarity(
    student_map: torch.Tensor,
    teacher_map: torch.Tensor,
    row_mask: torch.Tensor,
    similarity: str = "row",
    *,
    column_mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cosine similarity of two visual attention maps, 1 - ``attention_distillation_loss``; for logs and analyses.

    Arguments and result as there; 0 where no sample counts.
    """
    _check(student_map, teacher_map, row_mask, column_mask, "cosine", similarity, reduction)
    student, teacher, rows = _prepare(student_map, teacher_map, row_mask, column_mask)
    return _reduce(_cosine(student, teacher, rows, similarity), row_mask, column_mask, reduction)


def counting_samples(row_mask: torch.Tensor, column_mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B] bool: the samples that contribute to the loss (at least one counted row, at least one real visual key)."""
    counts = row_mask.any(dim=1)
    return counts if column_mask is None else counts & column_mask.any(dim=1)


def _check(student_map, teacher_map, row_mask, column_mask, kind, similarity, reduction) -> None:
    for name, value, allowed in (
        ("kind", kind, KINDS),
        ("similarity", similarity, SIMILARITIES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    if kind == "kl" and similarity == "matrix":
        raise ValueError("kind 'kl' compares rows, each a distribution over the visual keys; use similarity 'row'")
    if student_map.ndim not in (3, 4) or student_map.shape != teacher_map.shape:
        raise ValueError(
            f"both maps must be [B, N, N_v] or [B, H, N, N_v], got {list(student_map.shape)} (student) and "
            f"{list(teacher_map.shape)} (teacher)"
        )
    batch, columns = student_map.shape[0], student_map.shape[-1]
    length = student_map.shape[-2]
    if row_mask.dtype != torch.bool or row_mask.shape != (batch, length):
        raise ValueError(
            f"row_mask must be bool [B, N] = [{batch}, {length}], got {row_mask.dtype} {list(row_mask.shape)}"
        )
    if column_mask is not None and (column_mask.dtype != torch.bool or column_mask.shape != (batch, columns)):
        raise ValueError(
            f"column_mask must be bool [B, N_v] = [{batch}, {columns}], got {column_mask.dtype} "
            f"{list(column_mask.shape)}"
        )


def _check_weights(row_weights, row_mask, kind, similarity) -> None:
    if row_weights.shape != row_mask.shape or not row_weights.dtype.is_floating_point:
        raise ValueError(
            f"row_weights must be floating point [B, N] = {list(row_mask.shape)}, got {row_weights.dtype} "
            f"{list(row_weights.shape)}"
        )
    if kind == "cosine" and similarity == "matrix":
        raise ValueError("row_weights weigh rows, and similarity 'matrix' compares flattened maps; use 'row'")


def _prepare(student_map, teacher_map, row_mask, column_mask):
    """Both maps as wide [B, H, N, N_v] with everything that does not count set to 0 (NaN too), and rows [B, 1, N]."""
    counted = row_mask[:, None, :, None]
    if column_mask is not None:
        counted = counted & column_mask[:, None, None, :]
    maps = []
    for attention in (student_map, teacher_map.detach()):
        attention = attention.unsqueeze(1) if attention.ndim == 3 else attention
        maps.append(wide(attention).masked_fill(~counted, 0.0))
    return *maps, row_mask.unsqueeze(1)


def _mean_over_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N] to [B]: the mean over counted rows and over heads; 0 without a counted row.

    Args:
        rows: [B, 1, N] bool, or their weights.
    """
    total = rows.sum(dim=-1)
    return (values * rows).sum(dim=-1).div(total.where(total > 0, 1)).mean(dim=1)


def _cosine(student, teacher, rows, similarity) -> torch.Tensor:
    """[B]; 0 for samples without counted rows."""
    if similarity == "matrix":
        return _Cosine.apply(student.flatten(2), teacher.flatten(2)).mean(dim=1)
    return _mean_over_rows(_Cosine.apply(student, teacher), rows)


class _Cosine(torch.autograd.Function):
    """Cosine over the last dimension; 0 when either vector is 0, with a gradient to the first argument.

    Rows that attend to the image with almost no mass have squares below float32's range, so each vector is first
    divided by its largest entry, which the cosine does not depend on. Autograd would keep six arrays of the maps' size
    for the backward pass; the gradient itself, d cos / d a = (b/|b| - cos a/|a|) / |a|, is one.
    """

    @staticmethod
    def forward(ctx, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, peak = _unit_peak(left)
        right, _ = _unit_peak(right)
        norm = _norm(left)
        left.div_(norm)
        right.div_(_norm(right))
        cosine = (left * right).sum(dim=-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            # A vector of 0 has no direction to turn to.
            length = (norm * peak).clamp(min=torch.finfo(left.dtype).tiny)
            length = torch.where(left.any(dim=-1, keepdim=True), length, math.inf)
            ctx.save_for_backward(right.addcmul_(left, cosine, value=-1).div_(length))
        return cosine.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-1), None


def _unit_peak(vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if vector.shape[-1] == 0:
        return vector.clone(), vector.new_ones(*vector.shape[:-1], 1)
    peak = vector.abs().amax(dim=-1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    return vector / peak, peak


def _norm(vector: torch.Tensor) -> torch.Tensor:
    square = vector.square().sum(dim=-1, keepdim=True)
    return torch.where(square > 0, square, 1.0).sqrt()


def _row_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each row, renormalised over the visual keys. A student entry of 0 counts as the
    smallest number of its dtype; a row that is 0 in the teacher has no divergence."""
    smallest = torch.finfo(student.dtype).tiny
    teacher = teacher / teacher.sum(dim=-1, keepdim=True).clamp(min=smallest)
    log_student = student.clamp(min=smallest).log() - student.sum(dim=-1, keepdim=True).clamp(min=smallest).log()
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(dim=-1)


def _reduce(per_sample, row_mask, column_mask, reduction) -> torch.Tensor:
    if reduction == "none":
        return per_sample
    return per_sample.sum() / counting_samples(row_mask, column_mask).sum().clamp(min=1)
