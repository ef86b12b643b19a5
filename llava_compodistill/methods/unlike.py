"""L_ULD: what stands for L_KL where teacher and student have unlike tokenizers.

Universal Logit Distillation (Boizard et al., arXiv 2402.12030): probabilities are compared by rank. The paper adds it
to the cross-entropy with lambda = 1.5, at temperature 1 (its public code: configs/distillation.py).

At which rows: the paper's code pairs the n-th tokens of both answers, which soon stand at different words. Here the
first row of every aligned span is compared (`pair.tokens`): both models have read the same text of the answer there,
and each says what comes next. (For a span of several tokens, multiplying probabilities would give the probability of
one text, and no distribution over a vocabulary.) The sum is divided by the number of spans. The end tokens are
compared, too; the paper's code leaves out the student's.
"""

from __future__ import annotations

import torch

from ..hosts.base import MergedBatch
from ..ops.answer_loss.uld import uld_loss
from ..pair import Pair
from ..pair.tokens import in_both
from ..record.forward import Needs, Pass
from .base import Sums, Term

#: lambda of the paper.
WEIGHT = 1.5


def aligned_rows(mine: MergedBatch, theirs: MergedBatch, aligned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the answer rows of a batch in two models' layouts, those that correspond, [R] each.

    Args:
        aligned: [B, S, 2], as `pair.tokens.align_answers` gives it for each sample, padded with -1.
    """
    counts = [batch.answer_mask().sum(dim=1) for batch in (mine, theirs)]
    there = in_both(aligned, *counts)
    starts = torch.stack([count.cumsum(dim=0) - count for count in counts], dim=-1)
    first, second = (aligned + starts[:, None, :])[there].unbind(dim=-1)
    return first, second


class UniversalLogitTerm(Term):
    """L_ULD at the first row of every aligned span.

    Args:
        weight: its factor in the loss.
        temperature: of both softmaxes.
    """

    name = "uld"
    count = "aligned_spans"
    unlike_tokenizers = True

    def __init__(self, weight: float = WEIGHT, temperature: float = 1.0):
        self.weight, self.temperature = weight, temperature

    def prepare(self, pair: Pair) -> None:
        self.pair = pair

    def needs(self) -> tuple[Needs, Needs]:
        answers = Needs(head=frozenset({"answer"}))
        return answers, answers

    def on_head(self, student: Pass, teacher: Pass) -> torch.Tensor:
        mine, theirs = student.head["answer"], teacher.head["answer"]
        first, second = aligned_rows(student.batch, teacher.batch, teacher.aligned)
        (weight, bias), (teacher_weight, teacher_bias) = mine.weights, theirs.weights
        sizes = zip(self.pair.vocab_sizes, (weight, teacher_weight), strict=True)
        loss = uld_loss(
            mine.hidden[first],
            weight,
            theirs.hidden[second],
            teacher_weight,
            student_bias=bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            # A token without a row of the head cannot be predicted.
            vocab_sizes=tuple(None if size is None else min(size, len(head)) for size, head in sizes),
        )
        return loss[None]

    def __call__(self, student: Pass, teacher: Pass, returned: torch.Tensor) -> Sums:
        (loss,) = returned.unbind()
        return Sums(loss, {self.name: loss.detach()})
