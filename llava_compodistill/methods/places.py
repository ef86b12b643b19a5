"""Where visual tokens stand in both models' sequences: what terms that compare them token by token have in common."""

from __future__ import annotations

import torch

from ..hosts.base import MergedBatch
from ..hosts.llava.model import count_visual_tokens
from ..pair import Pair

_OTHER_PLACES = (
    "Teacher and student place visual tokens differently ({what}): {term} compares {object} token by token, so both "
    "need encoders with the same number of patches. Use the teacher's tower, or {way_out}."
)


def refuse_other_counts(pair: Pair, term: str, compared: str, way_out: str) -> None:
    """Refuse a pair whose models make different numbers of visual tokens of an image.

    Raises:
        ValueError: naming both numbers and the way out.
    """
    patches = count_visual_tokens(pair.teacher), count_visual_tokens(pair.student)
    if patches[0] != patches[1]:
        what = f"{patches[0]} and {patches[1]} an image"
        raise ValueError(_OTHER_PLACES.format(what=what, term=term, object=compared, way_out=way_out))


def check_same_visual_places(pair: Pair, mine: MergedBatch, theirs: MergedBatch) -> None:
    """Check that a batch's visual tokens stand at the same places in both models' sequences; with unlike tokenizers,
    that each sample has as many in both.

    Raises:
        ValueError: with the shapes.
    """
    if not pair.shares_tokenizer:  # the same tokens at other positions
        counts = [batch.counts("visual") for batch in (mine, theirs)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"A sample has {counts[1]} visual tokens in the teacher and {counts[0]} in the "
                "student: the text before an image is longer in one of them, and --model_max_length has cut it. Raise "
                "--model_max_length."
            )
        return
    # One encoder and one limit give one sequence.
    same = mine.visual_index.shape == theirs.visual_index.shape and (
        pair.shares_encoder or torch.equal(mine.on_cpu().visual_index, theirs.on_cpu().visual_index)
    )
    if not same:
        raise ValueError(
            "Teacher and student place visual tokens differently "
            f"({tuple(theirs.visual_index.shape)} and {tuple(mine.visual_index.shape)} positions): their tokenizers, "
            "--model_max_length or encoders differ."
        )


def samples_of(batch: MergedBatch, rows: str = "visual") -> list[torch.Tensor]:
    """For each sample that has such rows, where they lie among the rows of the whole batch."""
    counts = batch.counts(rows)
    places = torch.arange(sum(counts), device=batch.labels.device)
    return [part for part in places.split(counts) if len(part)]
