"""L_LM and L_KL over the answer rows: one term, since one pass over chunks of logits makes both (ops.answer_loss)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..hosts.base import MergedBatch, sent
from ..ops.answer_loss import answer_loss
from ..pair import Pair
from ..record.forward import Needs, Pass
from ..record.head import HeadRows, TopRows
from .base import Sums, Term
from .unlike import WEIGHT, UniversalLogitTerm

if TYPE_CHECKING:
    from .advantage import AdvantageTerm

logger = logging.getLogger(__name__)

#: Which of a batch's answer rows.
Rows = slice | torch.Tensor


def common_rows(mine: MergedBatch, theirs: MergedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the answer rows of two models' layouts of the same samples, those that both have: where an encoder of more
    patches, or a limit, has cut one of them, its last answers are missing there."""
    counts = [batch.counts("answer") for batch in (mine, theirs)]
    found: list[list[torch.Tensor]] = [[], []]
    starts = [0, 0]
    for pair in zip(*counts, strict=True):
        for model in (0, 1):
            found[model].append(torch.arange(starts[model], starts[model] + min(pair)))
            starts[model] += pair[model]
    first, second = (sent(torch.cat(rows), mine.labels.device) for rows in found)
    return first, second


class AnswerTerm(Term):
    """lm_weight L_LM + kl_weight L_KL (paper, Section 4.3); L_KL where there is a teacher.

    Of an answer that the student has given itself there is no label to learn: it has L_KL alone.

    L_KL needs one vocabulary. On a pair with unlike tokenizers L_ULD stands for it (`unlike`).

    Args:
        temperature: T of L_KL, which carries T squared.
        distilled: False leaves L_KL out, also where there is a teacher.
        advantage: another term of the method, which weighs the tokens of L_KL (L_LM stays as it is).
    """

    name = "answers"
    count = "answer_tokens"
    unlike_tokenizers = True
    from_cache = True

    def __init__(
        self,
        lm_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        distilled: bool = True,
        advantage: AdvantageTerm | None = None,
    ):
        self.lm_weight, self.kl_weight, self.temperature = lm_weight, kl_weight, temperature
        self.distilled, self.advantage = distilled, advantage

    def on(self, pair: Pair) -> Sequence[Term]:
        if pair.shares_tokenizer or not self.distilled:
            return [self]
        weight = WEIGHT * self.kl_weight
        logger.info(
            "The tokenizers differ: L_KL is left out. L_ULD stands for it, weight %g, where both models have read the "
            "same text of an answer.",
            weight,
        )
        alone = copy.copy(self)
        alone.distilled = False
        return [alone, UniversalLogitTerm(weight, self.temperature)]

    def prepare(self, pair: Pair) -> None:
        self.pair = pair

    def needs(self) -> tuple[Needs, Needs]:
        answers = Needs(head=frozenset({"answer"}))
        return answers, answers if self.distilled else Needs()

    def on_head(self, student: Pass, teacher: Pass | None) -> torch.Tensor:
        """[3]: the weighted sum that gradients come from, the sum of cross-entropies, the sum of divergences T^2."""
        mine, given = student.head["answer"], student.given_rows()
        if teacher is None or not self.distilled:
            return self._sums(mine, slice(None) if given is None else given)
        theirs = teacher.head["answer"] if teacher.top is None else teacher.top
        weights = None if self.advantage is None else self.advantage.token_weights(teacher)
        if self.pair.shares_encoder:  # and one limit: one sequence
            self._check_same_rows(len(mine.targets), len(theirs.targets))
            return self._compared(mine, slice(None), theirs, slice(None), given, weights)
        here = student.batch.on_cpu(), teacher.batch.on_cpu()
        common = common_rows(*here)
        targets = [batch.answer_targets() for batch in here]
        self._check_same_rows(*map(len, common), *(rows[part] for rows, part in zip(targets, common, strict=True)))
        both, others = (sent(rows, mine.hidden.device) for rows in common)
        total = self._compared(mine, both, theirs, others, given, weights)
        alone = torch.ones(len(targets[0]), dtype=torch.bool)
        alone[common[0]] = False
        rows = sent(alone.nonzero().flatten(), mine.hidden.device)
        if given is not None:
            rows = rows[given[rows]]
        return total + self._sums(mine, rows) if len(rows) else total

    def _compared(
        self,
        mine: HeadRows,
        rows: Rows,
        theirs: HeadRows | TopRows,
        their_rows: Rows,
        given: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of rows that both models have: both losses where the label is given, else L_KL alone.

        Args:
            weights: of the teacher's rows, what the divergence counts.
        """
        if given is None:
            return self._sums(mine, rows, theirs, their_rows, weights)
        own, other = (torch.arange(len(part.targets), device=given.device) for part in (mine, theirs))
        own, other = own[rows], other[their_rows]
        labelled = given[own]
        total = self._sums(mine, own[labelled], theirs, other[labelled], weights)
        alone = self._sums(mine, own[~labelled], theirs, other[~labelled], weights, lm_weight=0.0)
        loss, _, kl = alone.unbind()
        return total + torch.stack([loss, torch.zeros_like(kl), kl])

    def _sums(
        self,
        mine: HeadRows,
        rows: Rows,
        theirs: HeadRows | TopRows | None = None,
        their_rows: Rows | None = None,
        their_weights: torch.Tensor | None = None,
        lm_weight: float | None = None,
    ) -> torch.Tensor:
        weight, bias = mine.weights
        hidden = teacher_weight = teacher_bias = top = None
        if isinstance(theirs, TopRows):
            top = theirs.top.at(their_rows)
        elif theirs is not None:
            hidden = theirs.hidden[their_rows]
            with torch.no_grad():
                teacher_weight, teacher_bias = theirs.weights
        return torch.stack(
            answer_loss(
                mine.hidden[rows],
                weight,
                mine.targets[rows],
                hidden,
                teacher_weight,
                student_bias=bias,
                teacher_bias=teacher_bias,
                lm_weight=self.lm_weight if lm_weight is None else lm_weight,
                kl_weight=self.kl_weight,
                temperature=self.temperature,
                vocab_size=self.pair.vocab_size,
                kl_row_weights=None if their_weights is None else their_weights[their_rows],
                teacher_top=top,
            )
        )

    def _check_same_rows(self, mine: int, theirs: int, *targets: torch.Tensor) -> None:
        """Of their numbers, and of the targets where those are given."""
        if mine != theirs or (targets and not torch.equal(*targets)):
            raise ValueError(
                f"Teacher and student predict different answer tokens ({theirs} and {mine} rows): their "
                "tokenizers or --model_max_length differ."
            )

    def __call__(self, student: Pass, teacher: Pass | None, returned: torch.Tensor) -> Sums:
        loss, lm, kl = returned.unbind()
        logged, weights = {"lm": lm.detach()}, {"lm": self.lm_weight}
        if teacher is not None and self.distilled:
            logged["kl"], weights["kl"] = kl.detach(), self.kl_weight
        return Sums(loss, logged, weights)
