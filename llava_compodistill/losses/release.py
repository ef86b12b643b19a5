"""The attention loss of the authors' public code, which is another objective than the paper's formula.

On maps of visual queries over visual keys: entries above mean + one standard deviation in either model are dropped as
attention sinks; what is left of a key's column is averaged over the queries where the teacher's entry is left and not
0; the loss of a layer is 1 - cos of the two vectors of N_v means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import wide


def sink_filtered_loss(
    student_map: torch.Tensor, teacher_map: torch.Tensor, visual: torch.Tensor | None = None
) -> torch.Tensor:
    """[B]: 1 - cos of the pooled maps of one student layer and its target.

    Args:
        student_map, teacher_map: [B, N_v, N_v], head means of visual queries over visual keys; zeros above the causal
            diagonal count for mean and deviation. No gradient reaches the teacher's map, nor the choice of entries.
        visual: [B, N_v] bool, the visual tokens that are not padding; all by default.

    A sample without visual tokens has the loss 0 (and a graph).
    """
    student, teacher = wide(student_map), wide(teacher_map.detach())
    if visual is None:
        visual = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    real = visual[:, :, None] & visual[:, None, :]
    student, teacher = student.masked_fill(~real, 0.0), teacher.masked_fill(~real, 0.0)
    kept = real & (teacher != 0)
    for attention in (student.detach(), teacher):
        kept &= attention <= _mean_plus_deviation(attention, real)[:, None, None]
    count = kept.sum(dim=1).clamp(min=1)
    pooled = [(attention * kept).sum(dim=1) / count for attention in (student, teacher)]
    return visual.any(dim=1).to(student.dtype) - F.cosine_similarity(*pooled, dim=1)


def _mean_plus_deviation(attention: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[B]: mean plus (unbiased) standard deviation over a sample's real entries."""
    count = real.sum(dim=(1, 2)).clamp(min=1).to(attention.dtype)
    mean = attention.sum(dim=(1, 2)) / count
    squared = (attention - mean[:, None, None]).square().masked_fill(~real, 0.0).sum(dim=(1, 2))
    return mean + (squared / (count - 1).clamp(min=1)).sqrt()
