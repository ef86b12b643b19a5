"""Replace a student's attention over the image by the mean of its teacher's and its own (paper, Section 3.3, Fig. 4).

In the student's band, at the positions that predict the answer, every head's attention to the visual tokens becomes
half its own and half the mean map of the matched teacher layers. The rows are divided by their new sum, so that they
stay distributions. The paper does not say which positions, heads and sums it means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..hosts.base import MergedBatch
from ..hosts.llava.model import llava_core
from .attention import attention_modules, capture_visual_attention

#: student layer -> its target [B, N, N_v]
Targets = Mapping[int, torch.Tensor]


@contextlib.contextmanager
def blended_attention(
    model: nn.Module,
    layers: Sequence[int],
    targets: Callable[[], Targets],
    batch: Callable[[], MergedBatch],
    share: float = 0.5,
) -> Iterator[None]:
    """Inside the context the model's heads attend to the image as `(1 - share) own + share target`.

    Open it for one forward.

    Args:
        model: a LLaVA model, on any attention backend.
        layers: 0-based numbers of the layers.
        targets: gives the targets of the running forward.
        batch: gives its merged batch.
        share: of the target.
    """
    core = llava_core(model)
    modules = attention_modules(core)
    own: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        taps = capture_visual_attention(core, layers, batch, heads="all", receive=own.__setitem__)
        stack.enter_context(taps)
        for layer in layers:
            values: list[torch.Tensor] = []
            blend = _blend(layer, own, values, targets, batch, share)
            for hook in (
                modules[layer].v_proj.register_forward_hook(_keep(values)),
                modules[layer].o_proj.register_forward_pre_hook(blend),
            ):
                stack.callback(hook.remove)
        yield


def _keep(values: list[torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        values.append(output)

    return hook


def _blend(
    layer: int,
    own: dict[int, torch.Tensor],
    values: list[torch.Tensor],
    targets: Callable[[], Targets],
    batch: Callable[[], MergedBatch],
    share: float,
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A hook before the output projection, which receives the heads' outputs [B, N, H d]."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        outputs, where = args[0], batch()
        value = values.pop()
        attention = own.pop(layer)  # [B, H, N, N_v]
        size, heads, length, _ = attention.shape
        head_size = outputs.shape[-1] // heads
        value = value.view(size, length, -1, head_size).transpose(1, 2)  # [B, H_kv, N, d]
        index = where.visual_index.clamp(min=0)[:, None, :, None].expand(-1, value.shape[1], -1, head_size)
        value = value.gather(2, index).repeat_interleave(heads // value.shape[1], dim=1)  # [B, H, N_v, d]
        rows = where.answer_mask()[:, None, :, None]
        change = share * (targets()[layer].unsqueeze(1).to(attention.dtype) - attention)
        change = change.masked_fill(~(rows & (where.visual_index >= 0)[:, None, None, :]), 0.0)
        own_outputs = outputs.view(size, length, heads, head_size).transpose(1, 2)
        blended = own_outputs + (change.to(value.dtype) @ value).to(outputs.dtype)
        blended = blended / (1 + change.sum(dim=-1, keepdim=True)).to(outputs.dtype)
        return (blended.transpose(1, 2).reshape(outputs.shape),)

    return hook
