"""A decoder's layers on the real tokens of a batch alone: no product, norm or activation is spent on padding.

The model takes a padded batch [B, N] as ever, and what reaches its last norm and its head is padded again. In between,
the hidden states are [1, T, D]: the T real tokens of all samples one after the other, each at the position that it has
in its own sample. Attention stays inside a sample: FlashAttention is told where each begins (`cu_seq_lens`), SDPA is
called sample by sample, and eager attention, which is there to compare with, gets a block-diagonal mask.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..hosts import host_of
from ..hosts.base import MergedBatch, sent
from .patch import replaced

#: What a decoder layer is called with, in this order where it is not by name.
_ARGUMENTS = ("hidden_states", "attention_mask", "position_ids")


def unpadded(states: torch.Tensor, batch: MergedBatch) -> torch.Tensor:
    """[B, N, ...] -> [1, T, ...], the real tokens in reading order; as it is where it is that already."""
    return states[batch.places("all")][None] if states.shape[:2] == batch.real.shape else states


def padded(states: torch.Tensor, batch: MergedBatch) -> torch.Tensor:
    """[1, T, ...] -> [B, N, ...], zeros at padding; as it is where it is that already."""
    if states.shape[:2] == batch.real.shape:
        return states
    out = states.new_zeros(*batch.real.shape, *states.shape[2:])
    return out.index_put(batch.places("all"), states[0])


def padded_heads(states: torch.Tensor, batch: MergedBatch) -> torch.Tensor:
    """[1, H, T, d] -> [B, H, N, d], as `padded`."""
    return padded(states.transpose(1, 2), batch).transpose(1, 2)


def owners(batch: MergedBatch) -> torch.Tensor:
    """[T]: the sample of each real token."""
    return batch.places("all")[0]


@contextlib.contextmanager
def without_padding(model: nn.Module, batch: Callable[[], MergedBatch]) -> Iterator[None]:
    """Inside the context a model's decoder layers run on real tokens alone, also when gradient checkpointing runs them
    again.

    Args:
        model: a multimodal causal language model (not a wrapper around one).
        batch: gives the merged batch of the running forward.

    Raises:
        ValueError: for attention that cannot be kept inside a sample (`check_backend`); where an old transformers
            would scale positions by the length of all samples; in the forward, for a sample longer than the window of
            a layer that would attend to all of it.
    """
    host, backend = host_of(model), compat.attention_implementation(model)
    check_backend(backend)
    flash = is_flash(backend)
    scaling = getattr(model.config, "rope_scaling", None) or {}
    if compat.ALL_ATTENTION_FUNCTIONS is None and scaling.get("type") == "dynamic":
        # There a layer scales by the length that it is given, which is that of all samples together.
        raise ValueError(
            "--padding_free, --pack_length: not with a model of dynamic rope_scaling and this transformers (4.48 and "
            "later can). Leave the flags out."
        )
    layers = host.decoder_layers(model)

    def enter(number: int) -> Callable[..., tuple[tuple, dict]]:
        window = None if flash else compat.sliding_window(model.config, number)
        return lambda module, args, kwargs: _entering(batch(), backend, number, window, args, kwargs)

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):  # before transformers 5
            return padded(output[0], batch()), *output[1:]
        return padded(output, batch())

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(enter(number), with_kwargs=True).remove)
            stack.enter_context(_attending_by_sample(layer.self_attn, batch))
        stack.callback(layers[-1].register_forward_hook(leave).remove)
        for router in host.routers(model).values():
            stack.enter_context(_routing_samples(router, batch))
        yield


def is_flash(backend: str) -> bool:
    """Whether a backend is FlashAttention: the package's, or a kernel from the hub, which then has the hub's name."""
    return backend.startswith("flash") or "flash-attn" in backend


def check_backend(backend: str) -> None:
    """Refuse attention that would not stay inside a sample.

    Raises:
        ValueError: naming the flags and the way out.
    """
    if is_flash(backend):
        if compat.ALL_ATTENTION_FUNCTIONS is None:
            raise ValueError(
                "--padding_free, --pack_length: with FlashAttention these need transformers 4.48 or later. Use "
                "--attn_implementation sdpa, which also runs a FlashAttention kernel on CUDA."
            )
    elif backend not in ("eager", "sdpa"):
        raise ValueError(
            f"--padding_free, --pack_length: with --attn_implementation {backend} samples would attend to each other. "
            "Use sdpa, flash_attention_2 or eager, or leave out these flags."
        )


def _entering(
    batch: MergedBatch, backend: str, number: int, window: int | None, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """What a decoder layer receives instead."""
    length = batch.real.shape[1]
    if window is not None and length > window:
        raise ValueError(
            f"Layer {number} attends within a window of {window} tokens, and a sample has {length}: without padding "
            "it would attend to all of them. Lower --model_max_length to the window, or leave out --padding_free and "
            "--pack_length."
        )
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    states, positions = given["hidden_states"], given.get("position_ids")
    values = {
        "hidden_states": unpadded(states, batch),
        "attention_mask": _block_mask(batch, states.dtype) if backend == "eager" else None,
        "position_ids": None if positions is None else _at_tokens(positions, batch),
    }
    args = (*(values[name] for name in _ARGUMENTS[: len(args)]), *args[len(_ARGUMENTS) :])
    kwargs = {**kwargs, **{name: values[name] for name in _ARGUMENTS if name in kwargs}}
    if kwargs.get("position_embeddings") is not None:
        kwargs["position_embeddings"] = tuple(_at_tokens(part, batch) for part in kwargs["position_embeddings"])
    if is_flash(backend):
        counts = batch.counts("all")
        starts = sent(torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32), states.device)
        kwargs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        kwargs |= {"max_length_q": max(counts), "max_length_k": max(counts)}
    return args, kwargs


def _at_tokens(values: torch.Tensor, batch: MergedBatch) -> torch.Tensor:
    """[1 or B, N, ...] of positions -> [1, T, ...] of tokens."""
    return unpadded(values.expand(len(batch.real), *values.shape[1:]), batch)


def _block_mask(batch: MergedBatch, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, T], added to the scores: causal, and inside a sample."""
    owner = owners(batch)
    allowed = (owner[:, None] == owner[None, :]).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


@contextlib.contextmanager
def _attending_by_sample(module: nn.Module, batch: Callable[[], MergedBatch]) -> Iterator[None]:
    """Inside the context the SDPA that an attention module calls runs sample by sample. (All versions of transformers
    call PyTorch's function by its global name, which is replaced while the module's forward runs.)"""
    attend, forward = F.scaled_dot_product_attention, module.forward

    def by_sample(query, key, value, attn_mask=None, *args, **kwargs):
        ends = list(itertools.accumulate(batch().counts("all")))
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            if start < end:
                mine = (part[:, :, start:end] for part in (query, key, value))
                mask = None if attn_mask is None else attn_mask[..., start:end, start:end]
                parts.append(attend(*mine, mask, *args, **kwargs))
        return torch.cat(parts, dim=2)

    def run(*args: Any, **kwargs: Any) -> Any:
        with replaced(F, "scaled_dot_product_attention", by_sample):
            return forward(*args, **kwargs)

    with replaced(module, "forward", run):
        yield


@contextlib.contextmanager
def _routing_samples(router: nn.Module, batch: Callable[[], MergedBatch]) -> Iterator[None]:
    """Inside the context a router meets samples, in each of which the experts' room is shared out."""

    def enter(module: nn.Module, args: tuple) -> tuple:
        return padded(args[0], batch()), *args[1:]

    def leave(module: nn.Module, args: tuple, routing: Any) -> Any:
        return routing._replace(experts=unpadded(routing.experts, batch()), weights=unpadded(routing.weights, batch()))

    with contextlib.ExitStack() as stack:
        stack.callback(router.register_forward_pre_hook(enter).remove)
        stack.callback(router.register_forward_hook(leave).remove)
        yield
