"""The visual attention map the plain way: every probability is materialised, autograd does the rest.

The yardstick of the other implementations. Its matrix product runs in the dtype of the query, as a model's own eager
attention does; the softmax is in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch


def visual_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    mean_heads: bool,
) -> torch.Tensor:
    """See :func:`llava_compodistill.ops.visual_attention.visual_attention_map`; arguments are already validated."""
    batch, num_heads, length, _ = query.shape
    if key.shape[1] != num_heads:
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()

    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]  # [B, 1, N, N]
    # A finite fill keeps rows that see no key free of NaN, forward and backward; they are set to 0 below.
    probs = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
    if key_mask is not None:
        probs = probs * visible
    if mean_heads:
        probs = probs.mean(dim=1)

    columns = visual_index.unsqueeze(1) if mean_heads else visual_index[:, None, None]
    gathered = probs.gather(-1, columns.clamp(min=0).expand(*probs.shape[:-1], -1))
    return gathered * (columns >= 0)
