"""Where the image tokens are once the host has merged them into the text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from ..hosts import host_of
from ..hosts.base import IGNORE_INDEX, MergedBatch
from .patch import replaced

__all__ = ["IGNORE_INDEX", "MergeRecorder", "MergedBatch", "record_merge"]


class MergeRecorder:
    """Holds the `MergedBatch` of the newest forward; see `record_merge`."""

    def __init__(self) -> None:
        self._batch: MergedBatch | None = None

    @property
    def batch(self) -> MergedBatch:
        if self._batch is None:
            raise RuntimeError("No forward has run inside record_merge() yet.")
        return self._batch


@contextlib.contextmanager
def record_merge(
    model: nn.Module, received: Callable[[MergedBatch], None] = lambda batch: None
) -> Iterator[MergeRecorder]:
    """Record what the merge does in the forwards inside the context.

    The model is called as usual, with `labels` or without. Its forward receives no labels and, where padding is on the
    right, no attention mask (see `hosts.llava.model.recording_merge`).

    Args:
        model: a multimodal causal language model (not a wrapper around one).
        received: called with each forward's batch, before its layers run.

    Raises:
        RuntimeError: inside another `record_merge` of the same model.
    """
    host = host_of(model)
    if getattr(vars(model).get(host.MERGE), "records_merge", False):
        raise RuntimeError("This model's merge is recorded already: leave the other record_merge() first.")
    recorder = MergeRecorder()

    def receive(batch: MergedBatch) -> None:
        recorder._batch = batch
        received(batch)

    recording = host.recording_merge(model, getattr(model, host.MERGE), receive)
    recording.records_merge = True
    with replaced(model, host.MERGE, recording):
        yield recorder
