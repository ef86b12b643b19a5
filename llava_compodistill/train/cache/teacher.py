"""A teacher that is not there: what terms ask of it before training, and its passes, from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import CacheError, FlagError
from ...hosts.base import MergedBatch
from ...methods.base import Term
from ...record.forward import Pass
from .entries import What, read_pass


class CachedTeacher:
    """Stands for a teacher's model in a `Pair`.

    Args:
        config: the teacher's.
        tower: its sizes, as its vision tower has them.
        what: what the cache holds of each sample.
        read_adapter: reads the teacher's adapter from its checkpoint, for a new TAF adapter.
    """

    def __init__(self, config: Any, tower: Any, what: What, read_adapter: Callable[[], nn.Module] | None = None):
        self.config, self.what = config, what
        self._tower, self._read_adapter = tower, read_adapter

    def get_vision_tower(self) -> Any:
        return self._tower

    def adapter(self) -> nn.Module:
        """P_T, with the weights of the teacher's checkpoint."""
        if self._read_adapter is None:
            raise ValueError("This CachedTeacher was made without read_adapter: it has no adapter to fetch.")
        return self._read_adapter()

    def read(self, cached: Mapping[str, torch.Tensor] | None, batch: MergedBatch) -> Pass:
        """The teacher's pass over a batch whose tokens the student's forward has placed.

        Raises:
            CacheError: for a batch without anything of the cache.
        """
        if cached is None:
            raise CacheError("The batch holds nothing of the cache: give make_data_module cache=.")
        return read_pass(cached, batch, self.what)


def refuse_uncached(terms: Iterable[Term], flag: str) -> None:
    """Refuse terms that want more of a teacher than a cache holds.

    Args:
        flag: that asks for a cache, for the message.

    Raises:
        FlagError: naming the terms, what each wants, and the way out.
    """
    reasons = [f"{term.name} ({reason})" for term in terms if (reason := _wants_more(term)) is not None]
    if reasons:
        raise FlagError(
            f"{flag}: a cache holds the teacher's likeliest tokens at answer rows and mean maps of groups of its "
            f"layers, and this stage has terms that want more of it: {'; '.join(reasons)}. Train with the teacher "
            "itself, or change these flags."
        )


def _wants_more(term: Term) -> str | None:
    needs = term.needs()[1]
    if term.calibrated_by:
        return f"looks at the teacher before training: {term.calibrated_by}"
    if term.switched_needs() is not None:
        return "runs the teacher on the student's features"
    if term.blind_needs() is not None:
        return "runs the teacher without the image"
    wanted = {
        "its hidden states": needs.hidden,
        "maps of its single heads": needs.heads,
        "its routing": needs.routing,
        "its log-probabilities of the labels": needs.log_probs,
        "its hidden states at the head": needs.head if not term.from_cache else needs.head - {"answer"},
        "its maps in a way of their own": needs.groups if not term.from_cache else frozenset(),
    }
    named = [what for what, wants in wanted.items() if wants]
    return ", ".join(named) if named else None
