"""What a batch is like, counted in the collator: there it is on the CPU, and nothing has to wait for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..hosts.llava.training import IGNORE_INDEX, IMAGE_TOKEN_INDEX

#: The key of a batch's facts beside its tensors.
KEY = "facts"


@dataclass(frozen=True)
class BatchFacts:
    """Counts of one micro-batch; the sums of its terms are divided by these, added up over an optimizer step.

    Attributes:
        answer_tokens: that the model will predict.
        image_samples: samples with an image.
        samples: all samples.
        cut: samples whose answers all lie beyond the length limit.
    """

    answer_tokens: int
    image_samples: int
    samples: int
    cut: int = 0

    @classmethod
    def of(cls, batch: dict[str, Any], visual_tokens: int, limit: int | None) -> BatchFacts:
        """Count a batch as LLaVA's collator gives it.

        Args:
            visual_tokens: of one image.
            limit: LLaVA cuts the merged sequence, images included, at this length.
        """
        labels, ids = batch["labels"], batch["input_ids"]
        images = batch.get("images")
        width = visual_tokens if torch.is_tensor(images) and images.ndim == 4 else 1
        is_image = ids == IMAGE_TOKEN_INDEX
        position = torch.arange(ids.shape[1], device=ids.device) + is_image.long().cumsum(dim=1) * (width - 1)
        seen = (labels != IGNORE_INDEX) & (position > 0) & (position < (limit or torch.iinfo(torch.long).max))
        tokens = seen.sum(dim=1).tolist()
        return cls(sum(tokens), int(is_image.any(dim=1).sum()), len(tokens), tokens.count(0))


class CountingCollator:
    """A collator whose batches carry their facts.

    Args:
        collator: LLaVA's.
        visual_tokens, limit: as for `BatchFacts.of`.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]], visual_tokens: int, limit: int | None):
        self.collator, self.visual_tokens, self.limit = collator, visual_tokens, limit

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(samples)
        return {**batch, KEY: BatchFacts.of(batch, self.visual_tokens, self.limit)}
