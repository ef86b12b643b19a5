"""How long samples are once their images are merged in, and what a length limit leaves of their answers.

The text is read by the data set of training (`CheckedDataset.read_text`). Where the plugin's own templates meet a fast
tokenizer, the texts of many samples are tokenized in one call, by the function that training calls for each.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...hosts.llava.templates import TEMPLATES, tokenized_pieces
from ...hosts.llava.training import IMAGE_TOKEN_INDEX
from ...pair.tokens import TEACHER
from ..data import CheckedDataset
from ..facts import answer_tokens
from .processes import in_processes

_CHUNK = 256


@dataclass(frozen=True)
class Reading:
    """What one sample comes to.

    Attributes:
        place: its number in the mix.
        length: tokens of the merged sequence, images included; the longest of the readings of a sample (pairs of
            answers, a teacher with another tokenizer), less what the teacher's limit is above the student's.
        images: of the sample.
        answers: tokens that are learned from, without the limit.
        left: those of them within the limit.
        problem: why training cannot read it; the rest is 0 then.
        fatal: whether no --bad_samples passes over that.
    """

    place: int
    length: int = 0
    images: int = 0
    answers: int = 0
    left: int = 0
    problem: str | None = None
    fatal: bool = False


@dataclass(frozen=True)
class Limits:
    """Where sequences are cut.

    Attributes:
        visual_tokens, limit: of the student.
        teacher_visual_tokens, teacher_limit: of a teacher that reads the text with a tokenizer of its own.
    """

    visual_tokens: int
    limit: int
    teacher_visual_tokens: int = 0
    teacher_limit: int = 0


class Reader:
    """Reads samples of a data set as text.

    Args:
        dataset: of training.
        template: the conversation template in force.
    """

    def __init__(self, dataset: CheckedDataset, limits: Limits, template: Any):
        self.dataset, self.limits = dataset, limits
        alone = dataset.teacher is None and not dataset.paired
        self._together = alone and template.version in TEMPLATES and dataset.tokenizer.is_fast

    def read(self, places: Sequence[int]) -> list[Reading]:
        """The samples at some places of the mix."""
        if self._together:
            with contextlib.suppress(Exception):  # the sample that is to blame is found one by one
                return [
                    found if found.answers else self.read_one(found.place) for found in self._read_together(places)
                ]
        return [self.read_one(place) for place in places]

    def _read_together(self, places: Sequence[int]) -> Iterator[Reading]:
        conversations = [self.dataset.conversation(self.dataset.list_data_dict[place]) for place in places]
        pieces = tokenized_pieces(conversations, self.dataset.tokenizer, together=True)
        for place, found in zip(places, pieces, strict=True):
            length = images = answers = left = 0
            for tokens, is_answer in found:
                start = length
                length += len(tokens)
                if is_answer:
                    answers += len(tokens)
                    left += max(0, min(length, self.limits.limit) - max(start, 1))  # nothing predicts the first
                else:
                    here = tokens.count(IMAGE_TOKEN_INDEX)
                    length, images = length + (self.limits.visual_tokens - 1) * here, images + here
            yield Reading(place, length, images, answers, left)

    def read_one(self, place: int) -> Reading:
        """One sample, exactly as training reads it."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # LLaVA prints its "tokenization mismatch"
                sample = self.dataset.read_text(place)
        except Exception as error:
            cause = self.dataset.fault(error)
            if cause is None:
                name = f"an error that ends training: {type(error).__name__}: {error}"
                return Reading(place, problem=name, fatal=True)
            return Reading(place, problem=cause)
        both = [sample["chosen"], sample["rejected"]] if self.dataset.paired else [sample]
        found = [self._measured(reading) for reading in both]
        length = max(length for length, _, _ in found)
        left = min(left for _, _, left in found)
        if self.dataset.paired and length >= self.limits.limit:
            left = 0  # the preference step leaves such pairs out
        images = int((both[0]["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        return Reading(place, length, images, sum(answers for _, answers, _ in found), left)

    def _measured(self, sample: dict[str, Any]) -> tuple[int, int, int]:
        limits = self.limits
        length, answers, left = _measure(sample, limits.visual_tokens, limits.limit)
        if TEACHER in sample:
            theirs = _measure(sample[TEACHER], limits.teacher_visual_tokens, limits.teacher_limit)
            length = max(length, theirs[0] - (limits.teacher_limit - limits.limit))
        return length, answers, left


def _measure(sample: dict[str, torch.Tensor], visual_tokens: int, limit: int) -> tuple[int, int, int]:
    ids, labels = sample["input_ids"], sample["labels"]
    images = int((ids == IMAGE_TOKEN_INDEX).sum())
    batch = {"input_ids": ids[None], "labels": labels[None]}
    everything = int(answer_tokens(batch, visual_tokens, None))
    return len(ids) + images * (visual_tokens - 1), everything, int(answer_tokens(batch, visual_tokens, limit))


def packed_length(reading: Reading, limits: Limits, paired: bool) -> int:
    """Tokens of a sample in the longer of a pair's models, cut by the limit; of both answers where it has two.

    Args:
        limits: that the sample was read with. Those of the teacher count where its images take more.
    """
    more = max(0, limits.teacher_visual_tokens - limits.visual_tokens)
    length = min(reading.length + more * reading.images, max(limits.limit, limits.teacher_limit))
    return length * (2 if paired else 1)


def chosen_places(samples: int, wanted: int | None) -> list[int]:
    """All places of a mix, or `wanted` of them, evenly spread."""
    if wanted is None or wanted >= samples:
        return list(range(samples))
    return [number * samples // wanted for number in range(wanted)]


def measure(
    reader: Reader,
    places: Sequence[int],
    workers: int,
    done: Callable[[int], None] = lambda read: None,
    flag: str = "--workers",
) -> Iterator[Reading]:
    """The samples at some places, read in several processes, whose number `flag` sets."""
    chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
    yield from in_processes(Reader.read, reader, chunks, min(workers, len(chunks)), done, flag)


@dataclass
class Summary:
    """Lengths of the samples that were read.

    Attributes:
        lengths: [N] of the merged sequences.
        cut, lost: samples that the limit cuts, and those of them that it leaves no answer.
    """

    limit: int
    lengths: np.ndarray
    visual: np.ndarray
    cut: int = 0
    lost: int = 0

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """(from, to, samples) of each bin; the last one holds all that is cut."""
        if not len(self.lengths):
            return []
        top = min(self.limit, int(self.lengths.max()))
        step = max(1, -(-(top - int(self.lengths.min()) + 1) // bins))
        low = int(self.lengths.min())
        edges = list(range(low, top + 1, step))
        counts = [int(((self.lengths >= edge) & (self.lengths < min(edge + step, top + 1))).sum()) for edge in edges]
        rows = [(edge, min(edge + step - 1, top), count) for edge, count in zip(edges, counts, strict=True)]
        return rows + ([(top + 1, int(self.lengths.max()), self.cut)] if self.cut else [])

    def as_json(self) -> dict[str, Any]:
        shares = (0, 5, 25, 50, 75, 95, 99, 100)
        values = np.percentile(self.lengths, shares) if len(self.lengths) else []
        visual, times = np.unique(self.visual, return_counts=True)
        return {
            "measured": len(self.lengths),
            "limit": self.limit,
            "percentiles": {str(share): round(float(value)) for share, value in zip(shares, values, strict=False)},
            "mean": round(float(self.lengths.mean()), 1) if len(self.lengths) else None,
            "visual_tokens": dict(zip(map(str, visual.tolist()), times.tolist(), strict=True)),
            "cut": self.cut,
            "without_answer": self.lost,
            "histogram": [list(row) for row in self.histogram()],
        }
