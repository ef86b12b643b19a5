"""Tapping one attention layer: its post-rotary query and key, while it goes on computing with its own backend.

Since transformers 4.48 attention is a function that is looked up by name at every call; before, a class that is fixed
at construction. The two ways in are here; all that depends on them is the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import nn

from ..compat import ALL_ATTENTION_FUNCTIONS
from .patch import replaced

#: (module, query[B,H,N,d], key[B,H_kv,N,d], scale) -> None
AttentionTap = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], None]
_TAPPED = "compodistill_tapped"
WHOLE_SEQUENCES = "Attention maps are captured from whole sequences: call the model without a key/value cache."


@contextlib.contextmanager
def tap_attention(module: nn.Module, tap: AttentionTap) -> Iterator[None]:
    """Call `tap` with the post-rotary query and key at every forward of one attention module.

    The module goes on computing its output with its own backend; other modules are not touched.
    """
    if is_tapped(module):
        raise RuntimeError("This attention layer is tapped already: leave the other capture context first.")
    install = _tap_by_interface if ALL_ATTENTION_FUNCTIONS is not None else _tap_by_rotary
    module._compodistill_tap = tap
    try:
        with install(module):
            yield
    finally:
        del module._compodistill_tap


def is_tapped(module: nn.Module) -> bool:
    """Whether the module is an attention layer inside `tap_attention`."""
    return hasattr(module, "_compodistill_tap")


@contextlib.contextmanager
def _tap_by_interface(module: nn.Module) -> Iterator[None]:
    # The tapped module alone gets a config that names our function. The model's config stays, so the mask is still
    # built for the backend that the function then calls.
    tapped = copy.copy(module.config)
    module._compodistill_backend = module.config._attn_implementation
    if _TAPPED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[_TAPPED] = _tapped_attention
    tapped._attn_implementation = _TAPPED
    try:
        with replaced(module, "config", tapped):
            yield
    finally:
        del module._compodistill_backend


@contextlib.contextmanager
def uncompiled_taps() -> Iterator[None]:
    """Inside the context a compiler leaves the attention of tapped modules alone: what a tap keeps, and for whom, is
    another thing in every micro-batch."""
    before = ALL_ATTENTION_FUNCTIONS[_TAPPED] if _TAPPED in ALL_ATTENTION_FUNCTIONS else _tapped_attention
    ALL_ATTENTION_FUNCTIONS[_TAPPED] = _uncompiled()
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_TAPPED] = before


@functools.cache
def _uncompiled() -> Callable:
    return torch.compiler.disable(_tapped_attention)


def _tapped_attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    scale = kwargs.get("scaling")
    module._compodistill_tap(module, query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    backend = module._compodistill_backend
    if backend in (None, "eager"):
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[backend]
    return attend(module, query, key, value, attention_mask, **kwargs)


@contextlib.contextmanager
def _tap_by_rotary(module: nn.Module) -> Iterator[None]:
    # transformers < 4.48: eager, SDPA and flash classes all call the modeling file's `apply_rotary_pos_emb` by its
    # global name. It is replaced only while the tapped module's forward runs.
    source = sys.modules[_defining_class(module).__module__]
    rotary = source.apply_rotary_pos_emb
    forward = module.forward

    def rotate(query, key, *args, **kwargs):
        query, key = rotary(query, key, *args, **kwargs)
        module._compodistill_tap(module, query, key, query.shape[-1] ** -0.5)
        return query, key

    def tapped_forward(*args, **kwargs):
        cache = kwargs.get("past_key_value")
        if cache is not None and cache.get_seq_length(module.layer_idx):
            raise RuntimeError(WHOLE_SEQUENCES)  # the keys rotated here are the new ones only
        source.apply_rotary_pos_emb = rotate
        try:
            return forward(*args, **kwargs)
        finally:
            source.apply_rotary_pos_emb = rotary

    with replaced(module, "forward", tapped_forward):
        yield


def _defining_class(module: nn.Module) -> type:
    for cls in type(module).__mro__:
        if hasattr(sys.modules[cls.__module__], "apply_rotary_pos_emb"):
            return cls
    raise TypeError(
        f"{type(module).__name__} does not rotate its query and key through `apply_rotary_pos_emb`; with transformers "
        f"{transformers.__version__} the Llama, Mistral and Qwen2 families can be tapped."
    )
