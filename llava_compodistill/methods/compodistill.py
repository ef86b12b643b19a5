"""CompoDistill (arXiv 2510.12184, Section 4.3): L_LM + L_KL in DPT, L_LM + L_KL + L_ADL in DFT, L_LM in SFT.

`--attention_stages` gives L_ADL to other stages, too: an SFT stage that has it loads the teacher, and computes
L_LM + L_ADL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .advantage import AdvantageTerm
from .attention import VisualAttentionTerm
from .base import Term
from .heads import MatchedHeadsTerm
from .kd import KD

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class CompoDistill(KD):
    """Logit distillation and, in the dft stage by default, visual attention alignment."""

    name = "compodistill"
    aligns_attention = True
    weighed = ("tokens", "rows", "both")

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        terms = super().terms(stage, args)
        aligned = self.aligns(stage, args)
        if aligned or (args.measure_attention and stage in self.teacher_stages):
            term = MatchedHeadsTerm if args.attention_heads == "matched" else VisualAttentionTerm
            advantage = None
            if aligned and args.visual_advantage in ("rows", "both"):
                advantage = next(other for other in terms if isinstance(other, AdvantageTerm))
            terms.append(term(args, trained=aligned, advantage=advantage))
        return terms
