"""Where the image tokens are once the host has merged them into the text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..hosts import host_of
from ..hosts.base import IGNORE_INDEX, MergedBatch, sent
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
    model: nn.Module, received: Callable[[MergedBatch], None] = lambda batch: None, embed_once: bool = False
) -> Iterator[MergeRecorder]:
    """Record what the merge does in the forwards inside the context.

    The model is called as usual, with `labels` or without. Its forward receives no labels and, where padding is on the
    right, no attention mask (see `hosts.llava.model.recording_merge`).

    Args:
        model: a multimodal causal language model (not a wrapper around one).
        received: called with each forward's batch, before its layers run.
        embed_once: whether the embedding is called once a batch, so that ranks with different numbers of samples make
            the same calls.

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

    recording = host.recording_merge(model, getattr(model, host.MERGE), receive, embed_once)

    def merge(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _takes_ids_from_cpu(model.get_input_embeddings(), input_ids.device):
            return recording(input_ids, *args, **kwargs)

    merge.records_merge = True
    with replaced(model, host.MERGE, merge):
        yield recorder


@contextlib.contextmanager
def _takes_ids_from_cpu(embedding: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the context an embedding takes token ids that the CPU has kept."""

    def send(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return sent(args[0], device), *args[1:]

    handle = embedding.register_forward_pre_hook(send)
    try:
        yield
    finally:
        handle.remove()
