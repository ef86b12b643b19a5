"""The two operations in which attention distillation spends its time, each behind one public function."""

from .answer_loss import answer_loss
from .visual_attention import visual_attention_map

__all__ = ["answer_loss", "visual_attention_map"]
