"""Models with unlike tokenizers: where both have read the same part of an answer and are asked what comes next.

Both read one answer, in tokens of their own. Each token begins at some byte of the answer; where a token of the one
and a token of the other begin at the same byte, the rows that predict them stand behind the same text (that of GOLD in
TRL aligns by such bytes, too). The text between two such places is a span of one or more tokens on either side. Only
the first row of a span can be compared: the rows inside it follow text that ends where the other model has no token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..hosts.base import IGNORE_INDEX
from ..hosts.token_bytes import TokenBytes

#: Beside the student's tensors in a sample and in a batch: what a teacher with another tokenizer reads, and under
#: "aligned" the answer rows that correspond; or what a cache holds of a teacher (`train.cache`).
TEACHER = "teacher"


def students_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Of a batch what the student reads."""
    return {name: value for name, value in batch.items() if name != TEACHER}


def teachers_inputs(batch: Mapping[str, Any], shares_tokenizer: bool) -> dict[str, Any]:
    """Of a batch what the teacher reads; with a tokenizer of its own, "aligned" is among it.

    Raises:
        ValueError: for a batch that lacks the tokens of such a teacher.
    """
    if shares_tokenizer:
        return dict(batch)
    if TEACHER not in batch:
        raise ValueError("The batch lacks the teacher's tokens: give make_data_module teacher=teacher_text.")
    return {**students_inputs(batch), **batch[TEACHER]}


def shared_tokens(ours: Any, theirs: Any) -> int | None:
    """How many tokens two tokenizers share, where the one is the other with more tokens added at its end (Qwen2.5 has
    some that Qwen1.5 lacks); None where they are unlike."""
    count = min(len(ours), len(theirs))
    first, second = (
        {token: index for token, index in one.get_vocab().items() if index < count} for one in (ours, theirs)
    )
    return count if first == second else None


def first_difference(ours: Any, theirs: Any) -> str:
    """A token that two unlike tokenizers do not share."""
    mine, others = ours.get_vocab(), theirs.get_vocab()
    return min(token for token in mine.keys() | others.keys() if mine.get(token) != others.get(token))


def align_answers(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    student_bytes: TokenBytes,
    teacher_bytes: TokenBytes,
) -> torch.Tensor:
    """Where two readings of one conversation stand at the same place of an answer.

    The end token of an answer belongs to no text. It begins where the text ends, so that of the one corresponds to
    that of the other. White space around an answer may be the template's and is left out. Where the tokenizers change
    the text (Unicode normalisation, unknown characters), what is equal before and behind the change is aligned.

    Args:
        student, teacher: (input_ids, labels) of the sample, [N_S] and [N_T] each.

    Returns:
        [S, 2] int64, in order: the numbers of corresponding answer rows (the first position that predicts an answer
        token is 0) of the student and of the teacher.
    """
    mine, theirs = _answers(*student, student_bytes), _answers(*teacher, teacher_bytes)
    pairs: list[tuple[int, int]] = []
    # Where a limit has cut one of them, its last answers are missing.
    for (first, own), (second, other) in zip(mine, theirs, strict=False):
        pairs += [(first + i, second + j) for i, j in _same_places(own, other) if first + i >= 0 and second + j >= 0]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def in_both(aligned: torch.Tensor, student_rows: torch.Tensor, teacher_rows: torch.Tensor) -> torch.Tensor:
    """Which pairs of `align_answers` are there once limits have cut the sequences.

    Args:
        aligned: [B, S, 2], padded with -1.
        student_rows, teacher_rows: [B], the answer rows that each has left.

    Returns:
        [B, S] bool.
    """
    rows = torch.stack([student_rows, teacher_rows], dim=-1)[:, None, :]
    return ((aligned >= 0) & (aligned < rows)).all(dim=-1)


def _answers(ids: torch.Tensor, labels: torch.Tensor, token_bytes: TokenBytes) -> list[tuple[int, list[bytes]]]:
    """For each answer the number of its first row, and its tokens' bytes."""
    found: list[tuple[int, list[bytes]]] = []
    rows = -int(labels[0] != IGNORE_INDEX) if len(labels) else 0  # nothing predicts the token at position 0
    inside = False
    for index, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            if not inside:
                found.append((rows, []))
            found[-1][1].extend(token_bytes([index]))
            rows += 1
        inside = label != IGNORE_INDEX
    return found


def _same_places(mine: list[bytes], theirs: list[bytes]) -> list[tuple[int, int]]:
    """Pairs of tokens (by number) of two readings of an answer that begin at the same place of its text."""
    (own, places), (other, other_places) = _beginnings(mine), _beginnings(theirs)
    before = len(own) if own == other else len(os.path.commonprefix([own, other]))
    shortest = min(len(own), len(other))
    rest = shortest - before  # behind what both begin with
    behind = len(os.path.commonprefix([own[::-1][:rest], other[::-1][:rest]]))
    if 2 * (before + behind) < shortest:
        return []  # not the same text
    moved = {}
    for place, token in other_places.items():
        if place <= before:
            moved[place] = token
        elif place >= len(other) - behind:
            moved[place + len(own) - len(other)] = token
    return [(token, moved[place]) for place, token in places.items() if place in moved]


def _beginnings(pieces: list[bytes]) -> tuple[bytes, dict[int, int]]:
    """An answer's text without white space around it; and by place in it, the first token that begins there."""
    raw = b"".join(pieces)
    text = raw.lstrip()
    blank = len(raw) - len(text)
    if pieces and not pieces[-1]:  # else white space is the end, a caption's line break
        text = text.rstrip()
    places: dict[int, int] = {}
    end = -blank
    for number, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        if not piece or (start < len(text) and end > 0):  # all but white space alone
            places.setdefault(min(max(0, start), len(text)), number)
    return text, places
