"""L_ADL head by head, which the paper names as future work (Appendix J).

Head h of one layer has nothing to do with head h of the next, and both models have their own number of heads. So each
student head gets the head of its group's teacher layers whose attention is most like its own on a few batches before
training, each teacher head at most once a student layer (an optimal assignment, `scipy`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from ..record.forward import Needs, Pass
from .attention import VisualAttentionTerm

logger = logging.getLogger(__name__)

#: (layer, head)
Head = tuple[int, int]


class MatchedHeadsTerm(VisualAttentionTerm):
    """Over the student's layers and heads, the mean distance between a head's map and that of its teacher head."""

    from_cache = False
    _compares = "attention_heads"

    @property
    def calibration_batches(self) -> int:
        return self.args.calibration_batches

    def _align(self, *args: Any, **kwargs: Any) -> None:
        super()._align(*args, **kwargs)
        count = self.pair.teacher.config.num_attention_heads
        heads = range(self.pair.student.config.num_attention_heads)
        # Until the heads are compared, any stand in.
        self.assigned: list[list[Head]] = [[(group[0], head % count) for head in heads] for group in self.groups]

    def needs(self) -> tuple[Needs, Needs]:
        student = frozenset(_all_heads(self.pair.student, layer) for layer in self.student_layers)
        wanted = {head for heads in self.assigned for head in heads}
        layers = sorted({layer for layer, _ in wanted})
        teacher = frozenset((layer, tuple(sorted(head for at, head in wanted if at == layer))) for layer in layers)
        # Where each head's map lies in the teacher's pass.
        self._places = {(at, head): ((at, heads), heads.index(head)) for at, heads in teacher for head in heads}
        return Needs(heads=student, graph=self.trained), Needs(heads=teacher)

    def _maps(self, place: int, student: Pass, teacher: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps of a student layer's heads and their targets, [B, H, N, N_v]."""
        mine = student.head_maps[_all_heads(self.pair.student, self.student_layers[place])]
        found = [self._places[head] for head in self.assigned[place]]
        return mine, torch.stack([teacher.head_maps[key][:, index] for key, index in found], dim=1)

    # -----------------------------------------------------------------------------------------------------------------
    # Which head learns from which
    # -----------------------------------------------------------------------------------------------------------------
    def _compared_needs(self) -> tuple[Needs, Needs]:
        student = frozenset(_all_heads(self.pair.student, layer) for layer in self.student_layers)
        layers = sorted({layer for group in self.groups for layer in group})
        return Needs(heads=student), Needs(heads=frozenset(_all_heads(self.pair.teacher, layer) for layer in layers))

    def _compare(self, passes: Iterable[tuple[Pass, Pass | None]]) -> dict[str, Any]:
        """For each student layer, the teacher head of each of its heads."""
        totals: list[torch.Tensor] | None = None
        for student, teacher in passes:
            if not student.head_maps:
                continue  # a batch without an image
            rows = self._rows(student, teacher)
            found = []
            for layer, group in zip(self.student_layers, self.groups, strict=True):
                mine = student.head_maps[_all_heads(self.pair.student, layer)]
                theirs = [teacher.head_maps[_all_heads(self.pair.teacher, other)] for other in group]
                found.append(_similarities(mine, torch.cat(theirs, dim=1), rows))
            totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
        if totals is None:
            raise ValueError(self._NO_IMAGE.format(self.calibrated_by))
        count = self.pair.teacher.config.num_attention_heads
        heads = [
            [(group[index // count], index % count) for index in _assign(total)]
            for total, group in zip(totals, self.groups, strict=True)
        ]
        return {"heads": heads}

    def use(self, calibrated: dict[str, Any]) -> None:
        super().use(calibrated)
        self.assigned = [[(layer, head) for layer, head in heads] for heads in calibrated["heads"]]
        for layer, heads in zip(self.student_layers, self.assigned, strict=True):
            pairs = ", ".join(f"{head} <- {at}.{other}" for head, (at, other) in enumerate(heads))
            logger.info("L_ADL by heads, layer %d: %s", layer, pairs)


def _all_heads(model: nn.Module, layer: int) -> tuple[int, tuple[int, ...]]:
    return layer, tuple(range(model.config.num_attention_heads))


def _similarities(student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H_S, N, N_v] and [B, H_T, N, N_v] -> [H_S, H_T]: cosine of each query's row, summed over the rows [B, N]."""
    mine, theirs = (
        nn.functional.normalize(attention.float().masked_fill(~rows[:, None, :, None], 0.0), dim=-1)
        for attention in (student, teacher)
    )
    with torch.autocast(mine.device.type, enabled=False):
        return torch.einsum("bhnv,bmnv->hm", mine, theirs)


def _assign(similarities: torch.Tensor) -> list[int]:
    """For each row the column of the assignment with the largest sum; columns are reused where they are too few."""
    rows, columns = similarities.shape
    repeated = similarities.repeat(1, -(-rows // columns))
    _, chosen = linear_sum_assignment(repeated.double().cpu().numpy(), maximize=True)
    return [int(column) % columns for column in chosen]
