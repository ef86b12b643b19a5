"""Attention over visual tokens from the layers that are asked for, while every layer keeps its fast backend.

Only the named layers are tapped: beside their SDPA or FlashAttention output they hand the post-rotary query and key to
`visual_attention_map`. All other layers are left alone, and leaving the context leaves no trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import compat
from ..hosts import host_of
from ..hosts.base import MergedBatch
from ..ops.answer_loss.head import autocast_dtype
from ..ops.visual_attention import visual_attention_map
from .padding import padded_heads
from .taps import WHOLE_SEQUENCES, AttentionTap, tap_attention


class AttentionCapture:
    """Collects maps as the layers of one forward run.

    Attributes:
        maps: layer number -> [B, N, N_v] (or [B, H, N, N_v]); filled in the order of the layers.
        detach: record maps without a graph, to measure and not to train.
    """

    def __init__(
        self,
        layers: Sequence[int],
        batch: Callable[[], MergedBatch],
        impl: str = "auto",
        heads: str | Mapping[int, str] = "mean",
        receive: Callable[[int, Any], None] | None = None,
        reduce: Callable[[int, torch.Tensor], Any] | None = None,
    ):
        self.layers = list(layers)
        self.impl = impl
        self.heads = heads
        self.maps: dict[int, torch.Tensor] = {}
        self.detach = False
        self._batch = batch
        self._receive = receive or self.maps.__setitem__
        self._reduce = reduce or (lambda layer, attention: attention)
        self._seen: set[int] = set()

    def begin(self) -> None:
        """Forget the last forward's maps: call before each forward that is to be recorded."""
        self.maps.clear()
        self._seen.clear()

    def tap(self, layer: int, window: int | None = None) -> AttentionTap:
        """What a layer's attention module calls; `window` is the number of keys that it sees at most."""
        heads = self.heads if isinstance(self.heads, str) else self.heads[layer]

        def receive(module: nn.Module, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            if query.shape[2] != key.shape[2]:
                raise RuntimeError(WHOLE_SEQUENCES)
            batch = self._batch()
            query, key = (padded_heads(as_multiplied(states), batch) for states in (query, key))
            if window is not None and key.shape[2] > window:
                raise ValueError(outside_window(layer, window, key.shape[2]))
            if batch.visual_index.shape[1] == 0:
                return
            key_mask = batch.real if batch.left_padded else None  # only left padding hides keys from real rows
            if self.detach:
                query, key = query.detach(), key.detach()
            options = {"impl": self.impl, "heads": heads, "in_order": batch.in_order}
            attention = visual_attention_map(query, key, batch.visual_index, key_mask=key_mask, scale=scale, **options)
            # Gradient checkpointing runs the layer again in the backward: what is made of the map must be made again,
            # as in the forward, but the result belongs to the recomputation and is not recorded twice.
            reduced = self._reduce(layer, attention)
            if layer not in self._seen:
                self._seen.add(layer)
                self._receive(layer, reduced)

        return receive


def as_multiplied(states: torch.Tensor) -> torch.Tensor:
    """Queries or keys in the precision in which the model's own attention multiplies them: under autocast, rotary
    embeddings leave them in float32. (On a GPU, where the kernels are made for 16 bits; a CPU gains nothing by it.)"""
    dtype = autocast_dtype(states.device.type) if states.is_cuda else None
    return states if dtype is None else states.to(dtype)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a multimodal language model, first layer first."""
    return [layer.self_attn for layer in host_of(model).decoder_layers(model)]


def outside_window(layer: int, window: int, length: int) -> str:
    """Why a layer with sliding-window attention cannot be recorded."""
    return (
        f"Layer {layer} attends within a window of {window} tokens, and a sequence can have {length}: its attention "
        "map would not be the model's. Lower --model_max_length to the window, align layers without a window "
        "(--student_layers, --teacher_layers), or use --vat False."
    )


def refuse_windows(model: nn.Module, layers: Sequence[int], longest: int | None) -> None:
    """Refuse layers whose sliding window is shorter than the longest sequence, before any sequence is met.

    Args:
        longest: the limit that sequences are cut at; None where there is none.

    Raises:
        ValueError: naming the layer, its window and the ways out.
    """
    for layer in layers:
        window = compat.sliding_window(model.config, layer)
        if window is not None and longest is not None and longest > window:
            raise ValueError(outside_window(layer, window, longest))


@contextlib.contextmanager
def capture_visual_attention(
    model: nn.Module,
    layers: Sequence[int],
    batch: Callable[[], MergedBatch],
    *,
    impl: str = "auto",
    heads: str | Mapping[int, str] = "mean",
    receive: Callable[[int, Any], None] | None = None,
    reduce: Callable[[int, torch.Tensor], Any] | None = None,
) -> Iterator[AttentionCapture]:
    """Capture the attention over visual tokens of some layers.

    With gradient checkpointing keep the context open until the backward is done: its recomputation runs the layers
    again and has to meet the same taps.

    Args:
        model: a multimodal causal language model (not a wrapper around one).
        layers: 0-based numbers of the layers to tap.
        batch: gives the merged batch of the running forward (`MergeRecorder.batch`).
        impl: implementation of the op, see `visual_attention_map`.
        heads: "mean" for [B, N, N_v], "all" for [B, H, N, N_v]; or one of them for each layer.
        receive: called with (layer, map) instead of keeping the map in `maps`.
        reduce: what is made of a layer's map before it is received. With gradient checkpointing it runs again with the
            layer, so that operations with a graph belong here and not into `receive`.

    Raises:
        ValueError: for a layer the model does not have; in the forward, for a sequence longer than a layer's window.
        RuntimeError: for reentrant gradient checkpointing, under which maps would carry no gradient.
    """
    modules = attention_modules(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"Layer {layer}: the model has layers 0 to {len(modules) - 1}.")
    _refuse_reentrant_checkpointing(model)
    capture = AttentionCapture(layers, batch, impl, heads, receive, reduce)
    with contextlib.ExitStack() as taps:
        for layer in capture.layers:
            window = compat.sliding_window(model.config, layer)
            taps.enter_context(tap_attention(modules[layer], capture.tap(layer, window)))
        yield capture


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    backbone, layers = host_of(model).backbone(model), host_of(model).decoder_layers(model)
    if not (backbone.training and getattr(backbone, "gradient_checkpointing", False)):
        return
    function = getattr(backbone, "_gradient_checkpointing_func", None)
    if function is None and layers:
        function = getattr(layers[0], "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant", True):
        raise RuntimeError(
            "Reentrant gradient checkpointing gives captured attention maps no gradient: call "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
        )


class GroupMeans:
    """Running means of maps over groups of layers (method.md, "Group layer matching").

    Feed it the maps while the forward runs; no map is kept longer than its own layer.

    Args:
        groups: layers whose mean map is wanted, a list a group; a group of one layer is that layer's map.
    """

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = [list(group) for group in groups]
        self._means: list[torch.Tensor | None] = [None] * len(groups)

    @property
    def layers(self) -> list[int]:
        """The layers that are needed, in order."""
        return sorted({layer for group in self.groups for layer in group})

    def begin(self) -> None:
        self._means = [None] * len(self.groups)

    def receive(self, layer: int, attention: torch.Tensor) -> None:
        for position, group in enumerate(self.groups):
            if layer not in group:
                continue
            share = group.count(layer) / len(group)
            mean = self._means[position]
            if mean is None:
                self._means[position] = attention if share == 1 else attention * share
            elif mean.requires_grad or attention.requires_grad:
                self._means[position] = mean.add(attention, alpha=share)
            else:
                mean.add_(attention, alpha=share)

    @property
    def means(self) -> list[torch.Tensor]:
        """For each group its mean map [B, N, N_v]."""
        missing = [position for position, mean in enumerate(self._means) if mean is None]
        if missing:
            raise RuntimeError(f"The forward has not filled the groups {missing}.")
        return self._means
