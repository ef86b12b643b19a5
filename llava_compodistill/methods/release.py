"""CompoDistill as its authors' public code computes it (github.com/ptkjw1997/CompoDistill at 8411926).

It differs from the paper in the attention loss (`losses.release`), in the layers, in the sum over layers where the
paper has a mean, and in L_KL, which is taken at the rows whose own label counts, without the causal shift, over the
padded vocabulary of the student. Which of the two made the published figures is not known.

The code's logged L_KL is the cross-entropy -sum p_T log p_S; here it is the divergence, whose gradient is the same.
Its text-only samples enter the attention loss with text in the image's place; here they do not enter. Rates, LoRA and
the merging of DFT's LoRA before SFT are settings of the scripts: scripts/README.md, "As the authors' code".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..losses.release import sink_filtered_loss
from ..ops.answer_loss import answer_loss
from ..pair import Pair
from ..pair.layers import SIGHT, match_layers, parse_band, visual_understanding_layers
from ..record.attention import refuse_windows
from ..record.forward import Needs, Pass
from .answers import AnswerTerm
from .attention import attention_schedule
from .base import Method, Sums, Term
from .places import check_same_visual_places, refuse_other_counts

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

#: Depth of a model -> (first of the seven layers that are aligned, teacher layers averaged for one student layer).
LAYERS = {24: (8, 2), 28: (9, 3), 32: (11, 3), 40: (13, 5)}
_COUNT = 7


class UnshiftedTerm(Term):
    """KL(p_T || p_S) at the rows whose own label counts."""

    name = "kl"
    count = "answer_tokens"
    left_out_by = "--kl_weight 0"

    def __init__(self, weight: float):
        self.weight = weight

    def needs(self) -> tuple[Needs, Needs]:
        rows = Needs(head=frozenset({"labelled"}))
        return rows, rows

    def on_head(self, student: Pass, teacher: Pass) -> torch.Tensor:
        mine, theirs = student.head["labelled"], teacher.head["labelled"]
        (weight, bias), (teacher_weight, teacher_bias) = mine.weights, theirs.weights
        divergence = answer_loss(
            mine.hidden,
            weight,
            torch.zeros(len(mine.hidden), dtype=torch.long, device=mine.hidden.device),  # lm_weight 0: no label
            theirs.hidden,
            teacher_weight.detach(),
            student_bias=bias,
            teacher_bias=teacher_bias,
            lm_weight=0.0,
        )
        return divergence.loss[None]

    def __call__(self, student: Pass, teacher: Pass, returned: torch.Tensor) -> Sums:
        (loss,) = returned.unbind()
        return Sums(loss, {self.name: loss.detach()})


class ReleaseAttentionTerm(Term):
    """The sum over the student's layers of `losses.release.sink_filtered_loss`."""

    name = "attention"
    count = "image_samples"
    unlike_tokenizers = True  # of visual tokens to visual tokens

    def __init__(self, args: TrainingArguments):
        self.args, self.weight, self.schedule = args, args.attention_weight, attention_schedule(args)

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, "the attention loss", "maps", "another method")
        for name in ("student_layers", "teacher_layers"):
            if getattr(self.args, name) == SIGHT:
                raise ValueError(
                    f"--{name} {SIGHT}: --method release aligns the layers of the authors' code, or those that are "
                    "named. Name them, or use --method compodistill."
                )
        depths = [model.config.num_hidden_layers for model in (pair.student, pair.teacher)]
        default = self.args.student_layers == self.args.teacher_layers == "intermediate"
        if default and all(depth in LAYERS for depth in depths):
            (first, _), (teacher_first, window) = (LAYERS[depth] for depth in depths)
            self.student_layers = [first + place for place in range(_COUNT)]
            self.groups = [list(range(teacher_first + k, teacher_first + k + window)) for k in range(_COUNT)]
        else:
            if default:
                logger.info(
                    "Method release lists layers for models of %s layers; for %d and %d layers the paper's middle "
                    "layers and groups stand in (--student_layers, --teacher_layers).",
                    ", ".join(map(str, LAYERS)),
                    *depths,
                )
            bands = [parse_band(getattr(self.args, name), name) for name in ("student_layers", "teacher_layers")]
            student, teacher = (
                visual_understanding_layers(depth, band) for depth, band in zip(depths, bands, strict=True)
            )
            self.student_layers, self.groups = student, match_layers(student, teacher, "group")
        for model, layers in ((pair.student, self.student_layers), (pair.teacher, sum(self.groups, []))):
            refuse_windows(model, sorted(set(layers)), pair.longest)

    def needs(self) -> tuple[Needs, Needs]:
        student = frozenset((layer,) for layer in self.student_layers)
        return Needs(groups=student, graph=True), Needs(groups=frozenset(map(tuple, self.groups)))

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        batch = student.batch
        if not student.maps:  # no image in this micro-batch
            return Sums(None, {self.name: batch.labels.new_zeros((), dtype=torch.float32)})
        check_same_visual_places(self.pair, batch, teacher.batch)
        visual = batch.visual_index >= 0
        loss = torch.stack(
            [
                sink_filtered_loss(
                    _visual_queries(student.maps[(layer,)], batch.visual_index),
                    _visual_queries(teacher.maps[tuple(group)], teacher.batch.visual_index),
                    visual,
                )
                for layer, group in zip(self.student_layers, self.groups, strict=True)
            ]
        ).sum()
        return Sums(loss, {self.name: loss.detach()})


def _visual_queries(attention: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B, N, N_v] -> [B, N_v, N_v], the rows of the visual tokens."""
    index = visual_index.clamp(min=0)[:, :, None].expand(-1, -1, attention.shape[2])
    return attention.gather(1, index)


class Release(Method):
    """The three stages with the authors' terms."""

    name = "release"
    teacher_stages = ("dpt", "dft")
    aligns_attention = True
    #: With `shifted_kl` L_KL is the paper's, so that the attention loss alone differs from CompoDistill's.
    defaults: ClassVar[Mapping[str, Any]] = {"shifted_kl": False}

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        shifted = bool(self.options["shifted_kl"]) and stage in self.teacher_stages
        weights = {"lm_weight": args.lm_weight, "kl_weight": args.kl_weight, "temperature": args.kd_temperature}
        terms: list[Term] = [AnswerTerm(**weights, distilled=shifted)]
        if stage in self.teacher_stages and args.kl_weight > 0 and not shifted:
            terms.append(UnshiftedTerm(args.kl_weight))
        if self.aligns(stage, args):
            terms.append(ReleaseAttentionTerm(args))
        return terms
