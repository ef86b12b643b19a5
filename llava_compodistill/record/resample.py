"""A teacher's attention map on the student's tokens, where their towers cut images into other numbers of patches, or
their tokenizers cut text into other tokens.

Visual tokens lie on a square grid in each model: over the keys a map is a picture, which is resampled to the student's
grid; over the queries too. Text tokens correspond one to one with one tokenizer. With two, those correspond that
predict the same place of an answer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..hosts.base import MergedBatch
from ..pair.tokens import in_both


def on_other_grid(
    attention: torch.Tensor,
    theirs: MergedBatch,
    mine: MergedBatch,
    patches: tuple[int, int],
    aligned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring a map to another layout of the same samples.

    The attention of a query to an image keeps its sum: keys are averaged where the new grid is coarser, interpolated
    where it is finer, and scaled by the number of patches. A visual query is the mean, or the interpolation, of the
    queries around it. A text query keeps its place among the sample's text.

    Args:
        attention: [B, N_T, K_T] of the model whose layout `theirs` is; without a graph.
        theirs, mine: the layouts of both models.
        patches: visual tokens of an image in the one and in the other model.
        aligned: [B, S, 2], the answer rows that correspond with two tokenizers (`Pass.aligned`); a text query that is
            none of them has no counterpart.

    Returns:
        [B, N_S, K_S]; and [B, N_S] bool, the queries that have a counterpart.
    """
    size, length = mine.real.shape
    out = attention.new_zeros(size, length, mine.visual_index.shape[1])
    known = torch.zeros(size, length, dtype=torch.bool, device=attention.device)
    for sample in range(size):
        source, target = (batch.visual_index[sample][batch.visual_index[sample] >= 0] for batch in (theirs, mine))
        images = len(target) // patches[1]
        if images * patches[1] != len(target) or images * patches[0] != len(source) or not images:
            continue  # no image, or one that the limit of the length has cut
        keys = _resampled(attention[sample, :, : len(source)].t(), images, *patches).t() * (patches[0] / patches[1])
        text = _corresponding_text(theirs, mine, sample, None if aligned is None else aligned[sample])
        out[sample, text[1], : len(target)] = keys[text[0]]
        out[sample, target, : len(target)] = _resampled(keys[source], images, *patches)
        known[sample, text[1]] = True
        known[sample, target] = True
    return out, known


def _corresponding_text(
    theirs: MergedBatch, mine: MergedBatch, sample: int, aligned: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a sample's text queries in both layouts, [R] each."""
    if aligned is None:
        text = [(batch.real & ~batch.visual)[sample].nonzero().flatten() for batch in (theirs, mine)]
        count = min(map(len, text))
        return text[0][:count], text[1][:count]
    rows = [batch.answer_mask()[sample].nonzero().flatten() for batch in (theirs, mine)]
    counts = [torch.tensor([len(found)], device=aligned.device) for found in rows]
    first, second = aligned[in_both(aligned[None], counts[1], counts[0])[0]].unbind(dim=-1)
    return rows[0][second], rows[1][first]


def _resampled(values: torch.Tensor, images: int, source: int, target: int) -> torch.Tensor:
    """[images * source, C] on square grids -> [images * target, C]."""
    if source == target:
        return values
    old, new = math.isqrt(source), math.isqrt(target)
    grid = values.view(images, old, old, -1).permute(0, 3, 1, 2)
    grid = grid if grid.dtype == torch.float64 else grid.float()
    if new <= old:
        grid = F.interpolate(grid, size=(new, new), mode="area")
    else:
        grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(images * target, -1).to(values.dtype)


def repeated(batch: MergedBatch, times: int) -> MergedBatch:
    """Each sample several times in a row, as where heads are a part of the batch."""
    if times == 1:
        return batch
    fields = (batch.labels, batch.real, batch.visual_index)
    return MergedBatch(*(field.repeat_interleave(times, dim=0) for field in fields), batch.left_padded)
