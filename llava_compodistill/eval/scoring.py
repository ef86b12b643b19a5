"""Given answers scored from whole sequences, and the batches of such sequences, for the analyses.

One forward a batch gives both: the log-probability of the answers' tokens, and whether greedy decoding produces
exactly the answer (the likeliest token is the answer's at every position, the end token included).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..record.merge import MergeRecorder
from .requests import Continuation
from .sequences import WholeSequences

#: An image file, what is asked about it (without <image>), and the answer to score.
Question = Continuation


class Score(NamedTuple):
    """Scores of one answer.

    Attributes:
        log_probability: mean over the answer's tokens, in nats, the end token included.
        greedy: whether greedy decoding gives exactly this answer.
    """

    log_probability: float
    greedy: bool


def batches(
    questions: Sequence[Question], model: nn.Module, tokenizer: Any, *, version: str, batch_size: int = 32
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches on the model's device, in the order of the questions."""
    engine = WholeSequences(model, tokenizer, version=version)
    for start in range(0, len(questions), batch_size):
        yield engine.collate(questions[start : start + batch_size])


def score(
    questions: Sequence[Question],
    model: nn.Module,
    tokenizer: Any,
    *,
    version: str = "qwen_1_5",
    batch_size: int = 64,
    inside: Callable[[MergeRecorder], contextlib.AbstractContextManager] | None = None,
) -> list[Score]:
    """Score answers, in order.

    Args:
        model: a LLaVA model in eval mode, its vision tower loaded.
        version: conversation template.
        inside: makes the context that every forward runs in, for analyses that intervene in the model.
    """
    engine = WholeSequences(model, tokenizer, version=version, batch_size=batch_size, inside=inside)
    return [Score(*response) for response in engine.run(questions)]
