"""What a batch is like, counted in the collator: there it is on the CPU, and nothing has to wait for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..hosts.base import Kept, kept_on_cpu
from ..hosts.llava.training import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ..pair.tokens import TEACHER, in_both

#: The key of a batch's facts beside its tensors.
KEY = "facts"
#: The tensors of text in a batch.
TEXT = ("input_ids", "labels", "attention_mask")
#: Where the student has answered samples itself (`own_answers`), [B]: the number of the first answer row of the sample
#: that predicts a token of its own answer; -1 for a sample with the data's answers alone.
OWN = "own_answers"


@dataclass(frozen=True)
class BatchFacts:
    """Counts of one micro-batch; the sums of its terms are divided by these, added up over an optimizer step.

    Attributes:
        answer_tokens: that the model will predict.
        image_samples: samples with an image.
        samples: all samples.
        cut: samples whose answers all lie beyond the length limit.
        aligned_spans: spans of answers that begin at the same place in the student's and the teacher's tokens.
        own_samples: samples that the student has answered itself.
        own_tokens: answer tokens of those answers.
        text: the batch's tensors of text, which stay in the CPU's memory: where its images and answers are decides
            the shapes of a step, and is not asked of the device. Under TEACHER, those of such a teacher.
    """

    answer_tokens: int
    image_samples: int
    samples: int
    cut: int = 0
    aligned_spans: int = 0
    own_samples: int = 0
    own_tokens: int = 0
    text: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        batch: dict[str, Any],
        visual_tokens: int,
        limit: int | None,
        teacher: tuple[int, int | None] | None = None,
    ) -> BatchFacts:
        """Count a batch as LLaVA's collator gives it.

        Args:
            visual_tokens: of one image.
            limit: LLaVA cuts the merged sequence, images included, at this length.
            teacher: both of a teacher with another tokenizer, which counts where the batch holds what it reads.
        """
        images = batch.get("images")
        single = torch.is_tensor(images) and images.ndim == 4
        seen = answer_tokens(batch, visual_tokens if single else 1, limit)
        tokens = seen.tolist()
        with_image = (batch["input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
        spans = 0
        if teacher is not None and TEACHER in batch:
            theirs = batch[TEACHER]
            other = answer_tokens(theirs, teacher[0] if single else 1, teacher[1])
            spans = int(in_both(theirs["aligned"], seen, other).sum())
        first = batch[OWN].tolist() if OWN in batch else []
        own = [count - start for count, start in zip(tokens, first, strict=False) if start >= 0]
        own_tokens = sum(max(0, count) for count in own)
        counts = sum(tokens), int(with_image.sum()), len(tokens), tokens.count(0), spans, len(own), own_tokens
        return cls(*counts, _text_of(batch))


def kept(found: BatchFacts | None, sent: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inside the context, what is asked of the tensors of text of a batch that was sent to a device is asked of those
    that have stayed."""
    return kept_on_cpu(_pairs(sent, found.text) if found is not None else ())


def _text_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's tensors of text that are in the CPU's memory."""
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if name == TEACHER:
            found[name] = _text_of(value)
        elif name in TEXT and torch.is_tensor(value) and value.device.type == "cpu":
            found[name] = value
    return found


def _pairs(sent: Mapping[str, Any], stayed: Mapping[str, Any]) -> list[Kept]:
    found: list[Kept] = []
    for name, value in stayed.items():
        there = sent.get(name)
        if isinstance(value, Mapping):
            found += _pairs(there or {}, value)
        elif torch.is_tensor(there) and there.shape == value.shape:
            found.append((there, value))
    return found


def answer_tokens(batch: dict[str, Any], width: int, limit: int | None) -> torch.Tensor:
    """[B]: the answer tokens that are predicted, with `width` visual tokens in an image's place. LLaVA leaves out what
    the batch's attention mask does: padding, and padding's token where a text has it."""
    labels, ids = batch["labels"], batch["input_ids"]
    is_image = ids == IMAGE_TOKEN_INDEX
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    position = real.long().cumsum(dim=1) - 1 + is_image.long().cumsum(dim=1) * (width - 1)
    seen = real & (labels != IGNORE_INDEX) & (position > 0) & (position < (limit or torch.iinfo(torch.long).max))
    return seen.sum(dim=1)


class CountingCollator:
    """A collator whose batches carry their facts.

    Args:
        collator: LLaVA's.
        visual_tokens, limit, teacher: as for `BatchFacts.of`.
        pixels: the precision in which images leave it; None for the data's own.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        visual_tokens: int,
        limit: int | None,
        teacher: tuple[int, int | None] | None = None,
        pixels: torch.dtype | None = None,
    ):
        self.collator, self.visual_tokens, self.limit, self.teacher = collator, visual_tokens, limit, teacher
        self.pixels = pixels

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(samples)
        images = batch.get("images")
        if self.pixels is not None and images is not None:
            several = not torch.is_tensor(images)
            batch["images"] = [image.to(self.pixels) for image in images] if several else images.to(self.pixels)
        return {**batch, KEY: self.facts(batch)}

    def facts(self, batch: dict[str, Any]) -> BatchFacts:
        """Those of a batch that the inner collator has made."""
        return BatchFacts.of(batch, self.visual_tokens, self.limit, self.teacher)
