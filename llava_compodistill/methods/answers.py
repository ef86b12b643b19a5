"""L_LM and L_KL over the answer rows: one term, since one pass over chunks of logits makes both (ops.answer_loss)."""

from __future__ import annotations

import torch

from ..ops.answer_loss import answer_loss
from ..pair import Pair
from ..record.forward import Needs, Pass
from .base import Sums, Term


class AnswerTerm(Term):
    """lm_weight L_LM + kl_weight L_KL (paper, Section 4.3); L_KL where there is a teacher.

    Args:
        temperature: T of L_KL, which carries T squared.
        distilled: False leaves L_KL out, also where there is a teacher.
    """

    name = "answers"
    count = "answer_tokens"

    def __init__(
        self, lm_weight: float = 1.0, kl_weight: float = 1.0, temperature: float = 1.0, distilled: bool = True
    ):
        self.lm_weight, self.kl_weight, self.temperature = lm_weight, kl_weight, temperature
        self.distilled = distilled

    def prepare(self, pair: Pair) -> None:
        self.pair = pair

    def needs(self) -> tuple[Needs, Needs]:
        answers = Needs(head=frozenset({"answer"}))
        return answers, answers if self.distilled else Needs()

    def on_head(self, student: Pass, teacher: Pass | None) -> torch.Tensor:
        """[3]: the weighted sum that gradients come from, the sum of cross-entropies, the sum of divergences T^2."""
        rows = student.head["answer"]
        theirs = teacher.head["answer"] if teacher is not None and self.distilled else None
        weight, bias = rows.weights
        teacher_weight = teacher_bias = None
        if theirs is not None:
            self._check_same_rows(rows.targets, theirs.targets)
            with torch.no_grad():
                teacher_weight, teacher_bias = theirs.weights
        return torch.stack(
            answer_loss(
                rows.hidden,
                weight,
                rows.targets,
                None if theirs is None else theirs.hidden,
                teacher_weight,
                student_bias=bias,
                teacher_bias=teacher_bias,
                lm_weight=self.lm_weight,
                kl_weight=self.kl_weight,
                temperature=self.temperature,
                vocab_size=self.pair.vocab_size,
            )
        )

    def _check_same_rows(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        # One encoder and one limit give one sequence. Comparing values would wait for the device.
        same = len(mine) == len(theirs) and (self.pair.shares_encoder or torch.equal(mine, theirs))
        if not same:
            raise ValueError(
                f"Teacher and student predict different answer tokens ({len(theirs)} and {len(mine)} rows): their "
                "tokenizers or --model_max_length differ, or their encoders give other numbers of visual tokens and "
                "only one sequence was truncated."
            )

    def __call__(self, student: Pass, teacher: Pass | None, returned: torch.Tensor) -> Sums:
        loss, lm, kl = returned.unbind()
        logged, weights = {"lm": lm.detach()}, {"lm": self.lm_weight}
        if teacher is not None and self.distilled:
            logged["kl"], weights["kl"] = kl.detach(), self.kl_weight
        return Sums(loss, logged, weights)
