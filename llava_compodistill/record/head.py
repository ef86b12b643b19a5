"""Run a language model's head on the rows that are asked for, and nowhere else.

A multimodal sequence is mostly image and prompt; with a vocabulary of 150k tokens the logits of all positions are what
fills the card. Here the head's own call receives the whole sequence and works on its rows only. It stays the head's
call: DeepSpeed ZeRO-3 gathers its weight there, and DDP finds what it returns in the model's output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..hosts import host_of
from ..ops.answer_loss.top_tokens import TopTokens
from .patch import replaced


@dataclass
class HeadRows:
    """What reaches a model's head at R rows.

    Attributes:
        hidden: [R, D], in reading order.
        targets: [R], the tokens predicted there; for the answer rows only.
        head: the model's head.
        run: what calls it, which inside a recorded forward is not the head itself.
    """

    hidden: torch.Tensor
    targets: torch.Tensor | None
    head: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor]

    @functools.cached_property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, D] and bias [V] of the head; see `dense_head`."""
        return dense_head(self.head, self.hidden, self.run)


@dataclass
class TopRows:
    """What a cache holds of a teacher's distributions at R answer rows, in place of `HeadRows`.

    Attributes:
        top: the likeliest tokens, and the mass of the rest.
        targets: [R], the tokens predicted there.
    """

    top: TopTokens
    targets: torch.Tensor


#: (hidden states [B, N, D], the head as it was) -> what the head returns in their place
HeadForward = Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]


@contextlib.contextmanager
def at_head(model: nn.Module, forward: HeadForward) -> Iterator[None]:
    """Inside the context the head's call is `forward`'s."""
    head = host_of(model).head(model)
    run = head.forward
    with replaced(head, "forward", lambda hidden: forward(hidden, run)):
        yield


def dense_head(
    head: nn.Module, hidden: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [V, D] and bias [V] that a head multiplies ``hidden`` [..., D] with.

    A plain linear layer has them. One that PEFT has wrapped or bitsandbytes has quantised is asked what it makes of
    the unit vectors, with gradients to what it trains. Dropout of LoRA is not applied to a head.

    Args:
        run: calls the head, where its own `forward` has been replaced.
    """
    if type(head) is nn.Linear:
        return head.weight, head.bias
    run = run or head.forward
    size = hidden.shape[-1]
    unit = torch.eye(size, dtype=hidden.dtype, device=hidden.device)
    training = head.training
    head.eval()
    try:
        weight = run(unit)
        bias = None
        if any(name.split(".")[-1] == "bias" for name, _ in head.named_parameters()):
            bias = run(torch.zeros_like(unit[:1]))
            weight = weight - bias
    finally:
        head.train(training)
    return weight.t(), None if bias is None else bias[0]
