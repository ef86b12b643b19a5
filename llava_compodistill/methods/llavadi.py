"""LLaVADI (arXiv 2407.19409): L_LM + L_KL + L_feat in one distilled stage after plain pre-training.

L_feat is the distance between the last hidden states (what reaches the heads) of all tokens, once the map W has
brought the student's to the teacher's width; W is trained along, and in no checkpoint. The authors' public code is
followed: W is linear, GELU, linear, the distance is the mean squared error, all weights are 1. `{"map": "linear"}` and
`{"distance": "cosine"}` are the variants that a summary of the paper states. What is not certain: the weights in the
paper itself. Left out: their code standardises the logits of all tokens before the divergence in some runs; the
authors' own log has the plain one on answer tokens ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..losses.features import KINDS, feature_distance
from ..pair import Pair
from ..record.forward import Needs, Pass
from .answers import AnswerTerm
from .base import Method, Sums, Term
from .places import check_same_visual_places, refuse_other_counts, samples_of

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

MAPS = ("mlp", "linear")


class FeatureTerm(Term):
    """L_feat: the mean over a sample's tokens of the distance between mapped student and teacher states."""

    name = "features"
    count = "samples"

    def __init__(self, distance: str, kind: str, weight: float):
        if distance not in KINDS:
            raise ValueError(f"--method_options distance: must be one of {', '.join(KINDS)}, got {distance!r}.")
        if kind not in MAPS:
            raise ValueError(f"--method_options map: must be one of {', '.join(MAPS)}, got {kind!r}.")
        self.distance, self.kind, self.weight = distance, kind, weight

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, "L_feat", "hidden states", "another method")
        mine, theirs = (model.config.hidden_size for model in (pair.student, pair.teacher))
        layers = [nn.Linear(mine, theirs)]
        if self.kind == "mlp":
            layers += [nn.GELU(), nn.Linear(theirs, theirs)]
        self.module = nn.Sequential(*layers)

    def needs(self) -> tuple[Needs, Needs]:
        everything = Needs(head=frozenset({"all"}))
        return everything, everything

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        check_same_visual_places(self.pair, student.batch, teacher.batch)
        mapped = self.module(student.head["all"].hidden)
        distances = feature_distance(mapped, teacher.head["all"].hidden, self.distance)
        loss = torch.stack([distances[rows].mean() for rows in samples_of(student.batch, "all")]).sum()
        return Sums(loss, {self.name: loss.detach()})


class LLaVADI(Method):
    """Response and feature distillation."""

    name = "llavadi"
    recipe = ("pt", "dft")
    teacher_stages = ("dft",)
    defaults = {"distance": "mse", "map": "mlp", "feature_weight": 1.0}

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        terms: list[Term] = [AnswerTerm(args.lm_weight, args.kl_weight, args.kd_temperature)]
        if stage == "dft":
            options = self.options
            terms.append(FeatureTerm(options["distance"], options["map"], options["feature_weight"]))
        return terms
