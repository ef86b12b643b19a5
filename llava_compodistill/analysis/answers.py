"""Where the answers' tokens look, layer by layer, over the visual or over the text tokens (paper, Section 3.1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..hosts.base import MergedBatch
from ..hosts.llava.model import llava_core
from ..record.attention import capture_visual_attention
from ..record.merge import record_merge
from .similarity import merged_inputs

KEYS = ("visual", "text")


@torch.inference_mode()
def answer_attention(
    model: nn.Module, inputs: dict[str, torch.Tensor], keys: str = "visual"
) -> tuple[torch.Tensor, MergedBatch]:
    """The head-averaged attention of the tokens that predict the answer, the mean over them.

    Args:
        inputs: a batch as LLaVA's collator gives it.
        keys: visual tokens, or text tokens (of the prompt and of the answer).

    Returns:
        [layers, B, N_k], 0 where a sample has fewer keys than another; and where the tokens are.
    """
    core = llava_core(model)
    layers = range(core.config.num_hidden_layers)
    with record_merge(core) as recorder:

        def batch() -> MergedBatch:
            return recorder.batch if keys == "visual" else _with_keys(recorder.batch, recorder.batch.rows("text"))

        with capture_visual_attention(core, layers, batch) as capture:
            core.get_model()(**merged_inputs(core, inputs))
        rows = recorder.batch.answer_mask()[:, :, None]
        maps = [capture.maps[layer].masked_fill(~rows, 0.0).sum(dim=1) / rows.sum(dim=1) for layer in layers]
        return torch.stack(maps).float(), recorder.batch


def _with_keys(batch: MergedBatch, keys: torch.Tensor) -> MergedBatch:
    """The batch with other tokens in the visual ones' place."""
    counts = keys.sum(dim=1)
    index = torch.full((len(keys), int(counts.max())), -1, dtype=torch.long, device=keys.device)
    sample, position = keys.nonzero(as_tuple=True)
    index[sample, keys.long().cumsum(dim=1)[sample, position] - 1] = position
    return replace(batch, visual_index=index, cpu=None)
