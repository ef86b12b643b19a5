"""L_ADL, visual attention alignment (paper, Section 4.1): the term that makes CompoDistill."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..hosts.base import MergedBatch, sent
from ..hosts.llava.model import count_visual_tokens
from ..losses.attention import attention_distillation_loss, attention_similarity, counting_samples
from ..pair import Pair
from ..pair.layers import (
    SIGHT,
    match_layers,
    parse_band,
    refuse_more_student_layers,
    visual_understanding_layers,
)
from ..pair.sight import choose_layers
from ..record.attention import refuse_windows
from ..record.forward import Needs, Pass
from ..record.resample import on_other_grid, repeated
from .base import Sums, Term
from .places import check_same_visual_places
from .schedule import Schedule

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments
    from ..train.calibration import Calibration
    from .advantage import AdvantageTerm

logger = logging.getLogger(__name__)


class VisualAttentionTerm(Term):
    """Over the student's layers, the mean distance between its map and the mean map of a group of teacher layers.

    Args:
        args: bands, matching, distance, rows, weight and schedule.
        trained: False to log the similarity alone.
        advantage: another term of the method, which weighs the queries that predict an answer token.
    """

    name = "attention"
    count = "image_samples"
    unlike_tokenizers = True
    from_cache = True
    _NO_IMAGE = "{}: the first batches of the data hold no image. Raise --calibration_batches."
    #: The flag for which maps are compared before training.
    _compares: ClassVar[str] = "layer_matching"

    def __init__(self, args: TrainingArguments, trained: bool = True, advantage: AdvantageTerm | None = None):
        self.args, self.trained, self.weight = args, trained, args.attention_weight
        self.advantage = advantage
        self.schedule = attention_schedule(args) if trained else None
        self.student_layers: list[int] = []
        self.groups: list[list[int]] = []
        self._candidates: list[int] = []

    # -----------------------------------------------------------------------------------------------------------------
    # What is measured before training
    # -----------------------------------------------------------------------------------------------------------------
    @property
    def _by_sight(self) -> list[str]:
        """The models whose layers are chosen by their sight."""
        return [of for of in ("student", "teacher") if getattr(self.args, f"{of}_layers") == SIGHT]

    @property
    def calibration_batches(self) -> int:
        return self.args.calibration_batches if self.args.layer_matching == "adaptive" else 0

    @property
    def calibration_samples(self) -> int:
        return self.args.calibration_samples if self._by_sight else 0

    @property
    def calibrated_by(self) -> str:
        if not (self._by_sight or self.calibration_batches):
            return ""
        names = ["student_layers", "teacher_layers", "layer_matching"]
        names += ["sight_share", "calibration_samples"] if self._by_sight else []
        names += [self._compares, "attention_rows", "calibration_batches"] if self.calibration_batches else []
        return " ".join(f"--{name} {getattr(self.args, name)}" for name in dict.fromkeys(names))

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
        student, teacher = (self._band(of) for of in ("student", "teacher"))
        if "student" not in self._by_sight:
            refuse_more_student_layers(student, teacher, self.args.layer_matching)
        self._align(student, teacher)
        refuse_windows(pair.student, student, pair.longest)
        refuse_windows(pair.teacher, teacher, getattr(pair.teacher.config, "tokenizer_model_max_length", None))
        if not self.calibrated_by:
            self._report()

    def _band(self, of: str) -> list[int]:
        """The layers of a model that the flags name; all that can be chosen where it goes by sight."""
        band = parse_band(getattr(self.args, f"{of}_layers"), f"{of}_layers", measured=True)
        depth = getattr(self.pair, of).config.num_hidden_layers
        return visual_understanding_layers(depth, "all" if band == SIGHT else band)

    def _align(self, student: list[int], teacher: list[int], distances: Any = None, chosen: bool = False) -> None:
        """Match layers of both models.

        Args:
            distances: of adaptive matching.
            chosen: whether they are the layers that are trained on, and not all that can be chosen.
        """
        self.student_layers, self._candidates = student, teacher
        strategy = self.args.layer_matching
        if (strategy == "adaptive" and distances is None) or (self._by_sight and not chosen):
            strategy = "simple"  # stands in until it is measured which layers correspond
        self.groups = match_layers(student, teacher, strategy, distances=distances)

    def _report(self) -> None:
        pairs = zip(self.student_layers, self.groups, strict=True)
        listed = ", ".join(f"{layer} <- {group}" for layer, group in pairs)
        logger.info("L_ADL (%s): %s", self.args.layer_matching, listed)

    def needs(self) -> tuple[Needs, Needs]:
        student = frozenset((layer,) for layer in self.student_layers)
        teacher = frozenset(tuple(group) for group in self.groups)
        return Needs(groups=student, graph=self.trained), Needs(groups=teacher)

    # -----------------------------------------------------------------------------------------------------------------
    # Before training: layers by sight, then adaptive matching (Appendix F)
    # -----------------------------------------------------------------------------------------------------------------
    def calibrate(self, data: Calibration) -> dict[str, Any]:
        """By name: "sight" of the models, "student_layers" and "teacher_layers", where they are chosen by it; and
        "distances" of their layers, for adaptive matching."""
        found: dict[str, Any] = {}
        if self._by_sight:
            found = self._choose(data)
            self._align(found["student_layers"], found["teacher_layers"], chosen=True)
        if self.calibration_batches:
            found |= self._compare(data.passes(self.calibration_batches, self._compared_needs()))
        return found

    def _choose(self, data: Calibration) -> dict[str, Any]:
        sight = {of: data.sight(of) for of in reversed(self._by_sight)}  # a teacher without any ends the run
        pair, args = self.pair, self.args
        chosen = choose_layers(
            *(sight.get(of) or self._band(of) for of in ("student", "teacher")),
            depths=(pair.student.config.num_hidden_layers, pair.teacher.config.num_hidden_layers),
            share=args.sight_share,
            strategy=args.layer_matching,
        )
        return {
            "student_layers": chosen.student_layers,
            "teacher_layers": chosen.teacher_layers,
            "reasons": chosen.reasons,
            "sight": {of: measured.as_dict() for of, measured in sight.items()},
        }

    def _compared_needs(self) -> tuple[Needs, Needs]:
        student, teacher = (frozenset((layer,) for layer in band) for band in (self.student_layers, self._candidates))
        return Needs(groups=student), Needs(groups=teacher)

    def _compare(self, passes: Iterable[tuple[Pass, Pass | None]]) -> dict[str, Any]:
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
            raise ValueError(self._NO_IMAGE.format(self.calibrated_by))
        return {"distances": total.tolist()}

    def use(self, calibrated: dict[str, Any]) -> None:
        student, teacher = self.student_layers, self._candidates
        if self._by_sight:
            student, teacher = calibrated["student_layers"], calibrated["teacher_layers"]
            reasons = "; ".join(calibrated["reasons"])
            logger.info("Layers by sight (--sight_share %g): %s.", self.args.sight_share, reasons)
        self._align(student, teacher, calibrated.get("distances"), chosen=True)
        self._report()

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
        order = None
        if args.shuffle_attention_targets:
            order, moved = _another_image(batch)
            rows = rows & moved[:, None]
        counts = counting_samples(rows)
        options = {"similarity": args.attention_similarity, "column_mask": columns, "reduction": "none"}
        weights = None if self.advantage is None else self.advantage.row_weights(student, teacher)
        losses, similarities = [], []
        for place, layer in enumerate(self.student_layers):
            mine, target = self._maps(place, student, teacher)
            target = target if order is None else target[order]
            if self.trained:
                self._check_graph(layer, mine)
                weighted = {**options, "kind": args.attention_loss, "row_weights": weights}
                losses.append(attention_distillation_loss(mine, target, rows, **weighted))
            if self.trained and args.attention_loss == "cosine" and weights is None:
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


def _another_image(batch: MergedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """[B]: an order that gives every sample with an image the place of another such sample; and [B] bool, which have
    one: all of them, unless a micro-batch has a single image."""
    has_image = batch.on_cpu().has_image
    places = torch.arange(len(has_image))
    holders, order = has_image.nonzero().flatten(), places.clone()
    order[holders] = holders.roll(1)
    return sent(order, batch.labels.device), sent(order != places, batch.labels.device)
