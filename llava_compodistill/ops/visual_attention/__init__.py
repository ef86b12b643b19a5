"""The visual attention map: attention probabilities at the visual keys, without the attention matrix.

    probs = softmax(scale * query @ key.T + causal mask)      # over ALL visible keys, text and image
    map   = probs.mean(heads)[..., visual_index]              # [B, N, N_v]

The attention output of a layer still comes from its own (fused) kernel; this op is called beside it on the same
post-rotary query and key. Implementations share one signature and are listed in ``IMPLEMENTATIONS``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from . import fused, probe
from .chunked import CHUNK_ELEMENTS, visual_attention_chunked
from .eager import visual_attention_eager

logger = logging.getLogger(__name__)

# name -> f(query, key, visual_index, key_mask (bool or None), scale, mean_heads) on validated arguments
IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "eager": visual_attention_eager,
    "chunked": visual_attention_chunked,
    "triton": fused.visual_attention_triton,
}
HEADS = ("mean", "all")


def visual_attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    heads: str = "mean",
    in_order: bool = False,
) -> torch.Tensor:
    """Causal attention probabilities at the visual keys, differentiable in ``query`` and ``key``.

    Args:
        query: [B, H, N, d], after rotary embedding. float16, bfloat16, float32 or float64.
        key: [B, H_kv, N, d], same dtype and device; query head h reads key head h // (H / H_kv).
        visual_index: [B, N_v] int64, the positions of each sample's visual tokens in [0, N), in any order and with
            gaps; -1 pads samples with fewer. (The range is checked on a CPU only: elsewhere it would wait for the
            device.)
        key_mask: [B, N] bool or integer, true at real tokens. Needed for left padding; right padding needs none under
            the causal mask.
        scale: factor of the scores, ``d ** -0.5`` by default.
        impl: "auto", "eager" (materialises [B, H, N, N]; the reference), "chunked" (memory of one chunk) or "triton"
            (CUDA; float16, bfloat16 or float32; head sizes 16 to 256 that are a power of two). "auto" takes Triton
            where it runs and agrees with "eager" on a first small input, and says once through logging what it
            takes.
        heads: "mean" for the mean over heads, "all" for every head.
        in_order: the caller knows that each sample's positions ascend, with -1 behind them alone, and that
            ``key_mask`` hides none of them. (Triton's kernels need to know, and would ask the device.)

    Returns:
        [B, N, N_v] (``heads="all"``: [B, H, N, N_v]) in float32 whatever the input dtype, float64 for float64 inputs.
        Columns with index -1, keys after the row and rows that see no key are 0.

    Raises ``ValueError`` or ``TypeError`` with the value received and the values allowed; ``RuntimeError`` with what
    is missing when ``impl="triton"`` cannot run here.
    """
    _validate(query, key, visual_index, key_mask, heads)
    if key_mask is not None:
        key_mask = key_mask.bool()
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "auto":
        impl = _choose(query, key)
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    # The op sets its own precision: autocast would round the scores of float32 inputs.
    known = {"in_order": True} if in_order and impl == "triton" else {}
    with torch.autocast(query.device.type, enabled=False):
        return IMPLEMENTATIONS[impl](query, key, visual_index, key_mask, scale, heads == "mean", **known)


def _choose(query: torch.Tensor, key: torch.Tensor) -> str:
    """The implementation for these inputs: Triton's wherever it runs and is right, otherwise the fastest one measured.

    On a CPU, maps that fit in one chunk train up to a third faster when their few probabilities are simply kept for
    the backward pass; everything else, teacher maps under ``no_grad`` included, is faster and smaller in chunks.
    """
    if query.is_cuda:
        problem = fused.missing(query.device) or fused.unsupported(query)
        problem = problem or probe.disagreement(query.device, query.dtype, query.shape[-1])
        _announce("chunked" if problem else "triton", problem)
        return "chunked" if problem else "triton"
    batch, num_heads, length, _ = query.shape
    one_chunk = query.device.type == "cpu" and batch * num_heads * length**2 <= CHUNK_ELEMENTS["cpu"]
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    impl = "eager" if one_chunk and needs_grad else "chunked"
    _announce(impl)
    return impl


@functools.cache
def _announce(impl: str, problem: str | None = None) -> None:
    if problem is None:
        logger.info("Attention maps: %s.", impl)
    else:
        logger.warning("Attention maps: %s, not triton: %s.", impl, problem)


def _validate(
    query: torch.Tensor, key: torch.Tensor, visual_index: torch.Tensor, key_mask: torch.Tensor | None, heads: str
) -> None:
    if heads not in HEADS:
        raise ValueError(f"heads must be one of {list(HEADS)}, got {heads!r}")
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"query must be [B, H, N, d] and key [B, H_kv, N, d], got {list(query.shape)} and {list(key.shape)}"
        )
    batch, num_heads, length, head_size = query.shape
    if key.shape[0] != batch or key.shape[2:] != query.shape[2:]:
        raise ValueError(
            f"query and key must agree in B, N and d, got {list(query.shape)} and {list(key.shape)}"
            " (a key longer than the query, as with a key/value cache, is not supported)"
        )
    if length == 0 or key.shape[1] == 0 or num_heads % key.shape[1] != 0:
        raise ValueError(
            f"N must be positive and the {num_heads} query heads a multiple of the key heads, got N={length} and "
            f"{key.shape[1]} key heads"
        )
    if query.dtype != key.dtype or not query.dtype.is_floating_point:
        raise TypeError(f"query and key must share one floating-point dtype, got {query.dtype} and {key.dtype}")
    if visual_index.dtype != torch.int64:
        raise TypeError(f"visual_index must be int64, got {visual_index.dtype}")
    if visual_index.ndim != 2 or visual_index.shape[0] != batch:
        raise ValueError(f"visual_index must be [B, N_v] with B={batch}, got {list(visual_index.shape)}")
    if key_mask is not None:
        if key_mask.shape != (batch, length):
            raise ValueError(f"key_mask must be [B, N] = [{batch}, {length}], got {list(key_mask.shape)}")
        if key_mask.dtype.is_floating_point:
            raise TypeError(f"key_mask must be bool or integer (true at real tokens), got {key_mask.dtype}")
    for name, tensor in (("key", key), ("visual_index", visual_index), ("key_mask", key_mask)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; they must be on one device")
    if visual_index.device.type == "cpu" and visual_index.numel():
        low, high = (int(bound) for bound in visual_index.aminmax())
        if low < -1 or high >= length:
            raise ValueError(f"visual_index must lie in [0, {length}) or be -1 (padding), got {low} to {high}")
