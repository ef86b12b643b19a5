"""The losses as pure functions, one file a kind. Nothing here knows of a model: which rows count is decided by the
caller and given as masks.
"""

from .attention import attention_distillation_loss, attention_similarity, counting_samples
from .tokens import IGNORE_INDEX, answer_rows, logit_distillation_loss

__all__ = [
    "IGNORE_INDEX",
    "answer_rows",
    "attention_distillation_loss",
    "attention_similarity",
    "counting_samples",
    "logit_distillation_loss",
]
