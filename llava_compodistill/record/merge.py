"""Where the image tokens are once LLaVA has merged them into the text.

`prepare_inputs_labels_for_multimodal` tells nobody. But it gives every visual token the label IGNORE_INDEX, as it
gives every padded position; so when all other ignored labels carry a mark of their own, the unpadded positions that
are left with IGNORE_INDEX are exactly the visual tokens: for any template, several images anywhere, truncation,
any-resolution tiles and either padding side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

IGNORE_INDEX = -100
_MARKED = -101


@dataclass
class MergedBatch:
    """What LLaVA's merge did to a batch of B samples, padded to N positions.

    Attributes:
        labels: [B, N], IGNORE_INDEX at visual tokens, prompts and padding.
        real: [B, N] bool, False at padding.
        visual_index: [B, N_v] positions of the visual tokens, -1 where a sample has fewer than the batch's maximum.
    """

    labels: torch.Tensor
    real: torch.Tensor
    visual_index: torch.Tensor

    @property
    def visual(self) -> torch.Tensor:
        """[B, N] bool, True at visual tokens."""
        mask = torch.zeros_like(self.real)
        batch, column = (self.visual_index >= 0).nonzero(as_tuple=True)
        mask[batch, self.visual_index[batch, column]] = True
        return mask

    @property
    def has_image(self) -> torch.Tensor:
        """[B] bool."""
        if self.visual_index.shape[1] == 0:
            return torch.zeros(len(self.visual_index), dtype=torch.bool, device=self.visual_index.device)
        return self.visual_index[:, 0] >= 0

    def answer_mask(self) -> torch.Tensor:
        """[B, N] bool: the positions that predict an answer token (the label at i + 1; causal shift)."""
        mask = torch.zeros_like(self.real)
        mask[:, :-1] = self.labels[:, 1:] != IGNORE_INDEX
        return mask

    def answer_targets(self) -> torch.Tensor:
        """[R]: the labels predicted at `answer_mask`, in its order."""
        return self.labels[:, 1:][self.answer_mask()[:, :-1]]

    def attention_rows(self, rows: str = "all") -> torch.Tensor:
        """[B, N] bool: the queries that count in L_ADL: not padding, with a visual key at or before them.

        Args:
            rows: all, answer (that predict an answer token), text or visual.
        """
        counted = self.real & (self.visual.long().cumsum(dim=1) > 0)
        if rows == "answer":
            return counted & self.answer_mask()
        if rows == "text":
            return counted & ~self.visual
        if rows == "visual":
            return counted & self.visual
        if rows == "all":
            return counted
        raise ValueError(f"attention rows {rows!r}: must be all, answer, text or visual.")


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
def record_merge(model: nn.Module) -> Iterator[MergeRecorder]:
    """Record what LLaVA's merge does in the forwards inside the context.

    The model is called as usual, with `labels` or without. Its forward receives no labels, so it computes neither the
    full-vocabulary loss nor needs to know of this; and no attention mask where padding is on the right, since a causal
    model's real rows never see it, so that the fused attention kernels run.

    Args:
        model: a LLaVA causal language model (not a wrapper around one).

    Raises:
        RuntimeError: inside another `record_merge` of the same model.
    """
    if "prepare_inputs_labels_for_multimodal" in vars(model):
        raise RuntimeError("This model's merge is recorded already: leave the other record_merge() first.")
    merge = model.prepare_inputs_labels_for_multimodal
    recorder = MergeRecorder()

    def recording_merge(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None):
        given_labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        given_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        marked = given_labels.masked_fill(given_labels == IGNORE_INDEX, _MARKED)
        merged_ids, position_ids, mask, past_key_values, embeds, marked = merge(
            input_ids, position_ids, given_mask, past_key_values, marked, images, image_sizes
        )
        real = mask.bool()
        visual = real & (marked == IGNORE_INDEX)
        recorder._batch = MergedBatch(
            labels=marked.masked_fill((marked == _MARKED) | ~real, IGNORE_INDEX),
            real=real,
            visual_index=_positions(visual),
        )
        right_padded = getattr(model.config, "tokenizer_padding_side", "right") == "right"
        merged = embeds is not None  # without images the padding is as the caller made it
        if attention_mask is None or (merged and right_padded):
            mask = None
        return merged_ids, position_ids, mask, past_key_values, embeds, None

    model.prepare_inputs_labels_for_multimodal = recording_merge
    try:
        yield recorder
    finally:
        del model.prepare_inputs_labels_for_multimodal


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """[B, N] bool -> [B, most True in a row], their positions in order, padded with -1."""
    counts = mask.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    index = torch.full((mask.shape[0], width), -1, dtype=torch.long, device=mask.device)
    batch, position = mask.nonzero(as_tuple=True)
    column = mask.long().cumsum(dim=1)[batch, position] - 1
    index[batch, column] = position
    return index


def count_visual_tokens(model: nn.Module) -> int:
    """Visual tokens of one image: the encoder's patches (the adapters here keep their number)."""
    return model.get_vision_tower().num_patches
