"""L_ADL, visual attention alignment (paper, Section 4.1): the term that makes CompoDistill."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..hosts.base import MergedBatch
from ..hosts.llava.model import count_visual_tokens
from ..losses.attention import attention_distillation_loss, attention_similarity, counting_samples
from ..pair import Pair
from ..pair.layers import match_layers, parse_band, visual_understanding_layers
from ..record.attention import refuse_windows
from ..record.forward import Needs, Pass
from ..record.resample import on_other_grid, repeated
from .base import Sums, Term
from .places import check_same_visual_places
from .schedule import Schedule

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class VisualAttentionTerm(Term):
    """Over the student's layers, the mean distance between its map and the mean map of a group of teacher layers.

    Args:
        args: bands, matching, distance, rows, weight and schedule.
        trained: False to log the similarity alone.
    """

    name = "attention"
    count = "image_samples"
    unlike_tokenizers = True

    def __init__(self, args: TrainingArguments, trained: bool = True):
        self.args, self.trained, self.weight = args, trained, args.attention_weight
        self.schedule = attention_schedule(args) if trained else None
        self.student_layers: list[int] = []
        self.groups: list[list[int]] = []
        self._candidates: list[int] = []

    @property
    def calibration_batches(self) -> int:
        return self.args.calibration_batches if self.args.layer_matching == "adaptive" else 0

    # -----------------------------------------------------------------------------------------------------------------
    # Layers
    # -----------------------------------------------------------------------------------------------------------------
    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        self._patches = count_visual_tokens(pair.teacher), count_visual_tokens(pair.student)
        if self._patches[0] != self._patches[1]:
            logger.info("L_ADL: the teacher's maps are resampled from %d to %d patches an image.", *self._patches)
        if not pair.shares_tokenizer:
            logger.info(
                "L_ADL: the tokenizers differ, so queries of prompts are left out. Those of visual tokens count, and "
                "those of answers where both models have read the same text."
            )
        if self.schedule is not None:
            logger.info("L_ADL: its weight is %g times %s.", self.weight, self.schedule)
        args = self.args
        self.student_layers = visual_understanding_layers(
            pair.student.config.num_hidden_layers, parse_band(args.student_layers, "student_layers")
        )
        self._candidates = visual_understanding_layers(
            pair.teacher.config.num_hidden_layers, parse_band(args.teacher_layers, "teacher_layers")
        )
        if args.layer_matching == "adaptive":
            # Until the distances are measured any order-keeping match stands in.
            self.groups = match_layers(self.student_layers, self._candidates, "simple")
        else:
            self._match()
        refuse_windows(pair.student, self.student_layers, pair.longest)
        longest = getattr(pair.teacher.config, "tokenizer_model_max_length", None)
        refuse_windows(pair.teacher, self._candidates, longest)

    def _match(self, distances: Any = None) -> None:
        matching = self.args.layer_matching
        self.groups = match_layers(self.student_layers, self._candidates, matching, distances=distances)
        pairs = zip(self.student_layers, self.groups, strict=True)
        logger.info("L_ADL (%s): %s", matching, ", ".join(f"{layer} <- {group}" for layer, group in pairs))

    def needs(self) -> tuple[Needs, Needs]:
        student = frozenset((layer,) for layer in self.student_layers)
        teacher = frozenset(tuple(group) for group in self.groups)
        return Needs(groups=student, graph=self.trained), Needs(groups=teacher)

    # -----------------------------------------------------------------------------------------------------------------
    # Adaptive matching (Appendix F)
    # -----------------------------------------------------------------------------------------------------------------
    def calibration_needs(self) -> tuple[Needs, Needs]:
        student, teacher = (frozenset((layer,) for layer in band) for band in (self.student_layers, self._candidates))
        return Needs(groups=student), Needs(groups=teacher)

    def calibrate(self, passes: Iterable[tuple[Pass, Pass | None]]) -> list[list[float]]:
        """The KL distance of each student layer's map to each teacher layer's, summed over batches."""
        total: torch.Tensor | None = None
        for student, teacher in passes:
            if not student.maps:
                continue  # a batch without an image
            rows = self._rows(student, teacher)
            distances = [
                [
                    attention_distillation_loss(student.maps[(mine,)], teacher.maps[(theirs,)], rows, kind="kl")
                    for theirs in self._candidates
                ]
                for mine in self.student_layers
            ]
            stacked = torch.stack([torch.stack(row) for row in distances])
            total = stacked if total is None else total + stacked
        if total is None:
            raise ValueError("--layer_matching adaptive: the calibration batches hold no image.")
        return total.tolist()

    def use(self, calibrated: list[list[float]]) -> None:
        self._match(calibrated)

    # -----------------------------------------------------------------------------------------------------------------
    # The loss
    # -----------------------------------------------------------------------------------------------------------------
    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        batch, args = student.batch, self.args
        if not batch.visual_index.shape[1]:  # no image in this micro-batch
            zero = batch.labels.new_zeros((), dtype=torch.float32)
            logged = {self.name: zero} if self.trained else {}
            return Sums(None, logged, measured={"attention_similarity": (zero, zero)})
        rows = self._rows(student, teacher)
        columns = batch.visual_index >= 0
        counts = counting_samples(rows)
        order = _another_image(batch.has_image) if args.shuffle_attention_targets else None
        options = {"similarity": args.attention_similarity, "column_mask": columns, "reduction": "none"}
        losses, similarities = [], []
        for place, layer in enumerate(self.student_layers):
            mine, target = self._maps(place, student, teacher)
            target = target if order is None else target[order]
            if self.trained:
                self._check_graph(layer, mine)
                losses.append(attention_distillation_loss(mine, target, rows, kind=args.attention_loss, **options))
            if self.trained and args.attention_loss == "cosine":
                similarities.append(counts.to(mine.dtype) - losses[-1].detach())
            else:
                similarities.append(attention_similarity(mine.detach(), target, rows, **options))
        similarity = torch.stack(similarities).mean(dim=0).sum()
        measured = {"attention_similarity": (similarity, counts.sum())}
        if not self.trained:
            return Sums(None, measured=measured)
        loss = torch.stack(losses).mean(dim=0).sum()
        return Sums(loss, {self.name: loss.detach()}, measured=measured)

    def _rows(self, student: Pass, teacher: Pass) -> torch.Tensor:
        """[B, N] bool: the student's queries that count; the teacher's maps are brought to the student's tokens."""
        rows = student.batch.attention_rows(self.args.attention_rows)
        if self._patches[0] != self._patches[1] or not self.pair.shares_tokenizer:
            return rows & self._resample(student.batch, teacher)
        check_same_visual_places(self.pair, student.batch, teacher.batch)
        return rows

    def _resample(self, mine: MergedBatch, teacher: Pass) -> torch.Tensor:
        """Bring the teacher's maps to the student's tokens; returns the queries that have a counterpart."""
        known = mine.real
        for maps in (teacher.maps, teacher.head_maps):
            for key, attention in maps.items():
                flat = attention.flatten(0, 1) if attention.ndim == 4 else attention
                heads = flat.shape[0] // len(attention)
                layouts = [repeated(batch, heads) for batch in (teacher.batch, mine)]
                aligned = None if teacher.aligned is None else teacher.aligned.repeat_interleave(heads, dim=0)
                found, known = on_other_grid(flat, *layouts, self._patches, aligned)
                maps[key] = found.view(*attention.shape[:-2], *found.shape[1:])
                known = known.view(len(attention), heads, -1)[:, 0]
        return known

    def _maps(self, place: int, student: Pass, teacher: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The map of a student layer and its target, [B, N, N_v]."""
        return student.maps[(self.student_layers[place],)], teacher.maps[tuple(self.groups[place])]

    def _check_graph(self, layer: int, attention: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not attention.requires_grad:
            raise RuntimeError(
                f"The attention map of student layer {layer} carries no gradient: L_ADL would train nothing. Are the "
                "student's query and key projections frozen (--freeze_backbone, or LoRA without them)?"
            )


def attention_schedule(args: TrainingArguments) -> Schedule | None:
    """That of L_ADL's weight; None where it is constant."""
    if args.attention_schedule == "constant":
        return None
    return Schedule(args.attention_schedule, args.attention_schedule_end)


def _another_image(has_image: torch.Tensor) -> torch.Tensor:
    """[B] -> [B]: an order that gives every sample with an image the place of another such sample."""
    order = torch.arange(len(has_image), device=has_image.device)
    holders = has_image.nonzero().flatten()
    order[holders] = holders.roll(1)
    return order
