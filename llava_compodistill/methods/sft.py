"""Supervised training: L_LM alone, in every stage and without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .answers import AnswerTerm
from .base import Method, Term

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class SFT(Method):
    """LLaVA's own training."""

    name = "sft"
    recipe = ("pt", "sft")

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        return [AnswerTerm(lm_weight=args.lm_weight)]
