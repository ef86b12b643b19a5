"""Logit distillation: L_LM + L_KL where a teacher is loaded (the paper's pair without VAT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .advantage import AdvantageTerm
from .answers import AnswerTerm
from .base import Method, Term

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class KD(Method):
    """Distilled pre-training and distilled fine-tuning by the teacher's logits alone."""

    name = "kd"
    teacher_stages = ("dpt", "dft")
    weighed = ("tokens",)
    on_policy = True

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        distilled = stage in self.teacher_stages  # where another stage has a teacher, it is for another term
        weighs = args.visual_advantage != "none" and self.has_teacher(stage, args)
        advantage = AdvantageTerm(args) if weighs else None
        answers = AnswerTerm(
            lm_weight=args.lm_weight,
            kl_weight=args.kl_weight,
            temperature=args.kd_temperature,
            distilled=distilled,
            advantage=advantage if args.visual_advantage in ("tokens", "both") else None,
        )
        return [answers] if advantage is None else [answers, advantage]
