"""A sample's visible keys as two ascending lists, visual and other: what the Triton kernels walk along."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch


class KeyLists(NamedTuple):
    """Positions are int32 and ascending; unused entries hold N.

    Attributes:
        visual: [B, N_v] the visual keys.
        other: [B, N] all other keys that are not hidden.
        visual_before, other_before: [B, N] how many entries of each list are at or before a position.
        column: None where `visual` is the caller's `visual_index`, column by column. Otherwise [B, N_v], the column of
            `visual` with the position that the caller asks for (N_v where it asks for none).
    """

    visual: torch.Tensor
    other: torch.Tensor
    visual_before: torch.Tensor
    other_before: torch.Tensor
    column: torch.Tensor | None


def key_lists(
    visual_index: torch.Tensor, key_mask: torch.Tensor | None, length: int, in_order: bool = False
) -> KeyLists:
    """The lists of a batch; the last ones are kept, since all layers of a forward ask for the same.

    Making them waits for the device once, to learn whether the columns are in order, unless the caller knows
    (`in_order`).
    """
    global _last
    inputs = (visual_index, key_mask)
    # Tensors made under inference_mode count no versions: they could change without a trace.
    if any(x is not None and x.is_inference() for x in inputs):
        return _make(visual_index, key_mask, length, in_order)
    state = (length, *(None if x is None else x._version for x in inputs))
    if _last is not None:
        references, seen, lists = _last
        if seen == state and all(r() is x if r else x is None for r, x in zip(references, inputs, strict=True)):
            return lists
    lists = _make(visual_index, key_mask, length, in_order)
    _last = (tuple(None if x is None else weakref.ref(x) for x in inputs), state, lists)
    return lists


_last: tuple[tuple[weakref.ref | None, ...], tuple[int | None, ...], KeyLists] | None = None


@torch.no_grad()
def _make(visual_index: torch.Tensor, key_mask: torch.Tensor | None, length: int, in_order: bool) -> KeyLists:
    asked = visual_index.masked_fill((visual_index < 0) | (visual_index > length), length)
    if key_mask is not None:  # nobody attends to a hidden key, visual or not
        hidden = torch.nn.functional.pad(~key_mask, (0, 1))
        asked = asked.masked_fill(hidden.gather(1, asked), length)

    visual, column = asked, None
    step = asked.diff(dim=1)
    if not in_order and not bool(((step > 0) | (asked[:, 1:] == length)).all()):
        # Any other order, gaps in the padding, positions asked for twice: each position once, in order.
        visual = asked.sort(dim=1).values
        repeated = torch.nn.functional.pad(visual.diff(dim=1) == 0, (1, 0))
        visual = visual.masked_fill(repeated, length).sort(dim=1).values
        column = torch.searchsorted(visual, asked).masked_fill(asked == length, asked.shape[1])

    positions = torch.arange(length, device=asked.device)
    is_visual = torch.zeros(len(asked), length + 1, dtype=torch.bool, device=asked.device)
    is_visual = is_visual.scatter_(1, asked, True)[:, :length]
    is_other = ~is_visual if key_mask is None else ~is_visual & key_mask
    return KeyLists(
        visual=visual.int().contiguous(),
        other=torch.where(is_other, positions, length).sort(dim=1).values.int(),
        visual_before=is_visual.cumsum(1, dtype=torch.int32),
        other_before=is_other.cumsum(1, dtype=torch.int32),
        column=column,
    )
