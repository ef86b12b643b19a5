"""In which layers does a model read the image? Take the image from a layer's sight and see what is lost.

VAT aligns attention in the layers where the teacher turns to the image. The paper finds them in the middle of large
language models (Section 3); a model of another make may have them elsewhere, and then `--student_layers` and
`--teacher_layers` should say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from .. import compat
from ..hosts.llava.model import llava_core
from .attention import attention_modules
from .merge import MergedBatch


@contextlib.contextmanager
def without_sight(model: nn.Module, layers: Sequence[int], batch: Callable[[], MergedBatch]) -> Iterator[None]:
    """In these layers, text queries attend to text alone; visual tokens still attend to each other.

    Args:
        model: a LLaVA model on eager attention or SDPA.
        layers: 0-based numbers of the layers.
        batch: gives the merged batch of the running forward (`MergeRecorder.batch`).

    Raises:
        ValueError: for a layer that the model lacks, or an attention backend that takes no mask.
    """
    core = llava_core(model)
    modules = attention_modules(core)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"Layer {layer}: the model has layers 0 to {len(modules) - 1}.")
    backend = compat.attention_implementation(core)
    if backend not in ("eager", "sdpa"):
        raise ValueError(f"Attention backend {backend!r} takes no mask of its own: load the model with eager or sdpa.")

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, {**kwargs, "attention_mask": _mask(batch(), hidden)}

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = modules[layer].register_forward_pre_hook(hide, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _mask(batch: MergedBatch, hidden: torch.Tensor) -> torch.Tensor:
    """[B, 1, N, N], added to the scores: causal, no padding, and nothing visual for text queries."""
    size, length = hidden.shape[:2]
    visual = torch.zeros(size, length + 1, dtype=torch.bool, device=hidden.device)
    visual.scatter_(1, batch.visual_index.where(batch.visual_index >= 0, length), True)  # pads fall off the end
    visual = visual[:, :length]
    allowed = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    allowed = allowed & batch.real[:, None, :] & (visual[:, :, None] | ~visual[:, None, :])
    # A row without any key would be NaN; padding rows, which nobody reads, see themselves.
    allowed |= torch.eye(length, dtype=torch.bool, device=hidden.device)
    smallest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, smallest)[:, None]
