"""Logit distillation: L_LM + L_KL where a teacher is loaded (the paper's pair without VAT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .answers import AnswerTerm
from .base import Method, Term

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class KD(Method):
    """Distilled pre-training and distilled fine-tuning by the teacher's logits alone."""

    name = "kd"
    teacher_stages = ("dpt", "dft")
    on_policy = True

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        distilled = stage in self.teacher_stages  # where another stage has a teacher, it is for another term
        return [AnswerTerm(args.lm_weight, args.kl_weight, args.kd_temperature, distilled)]
