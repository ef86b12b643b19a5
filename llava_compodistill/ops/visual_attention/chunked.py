"""The visual attention map in chunks of rows, heads and samples, with a hand-written backward pass.

With P = softmax(scale * q k^T) over all causal keys and G the gradient of the map, let g be G (divided by the number
of heads for a head mean) placed on the visual keys, 0 on every other key. Then

    D_i  = sum_j P_ij g_ij
    dS   = P * (g - D)          over ALL keys: the denominator of the softmax sees the text keys too
    dq   = scale * dS k,        dk = scale * dS^T q

P is made again in the backward pass, so that only q, k and the index are kept. A chunk of rows [r0, r1) meets the keys
[0, r1) only; rows before the first visual key are not computed, nor are row blocks whose incoming gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

# Probabilities held at a time. On a CPU a chunk should stay in the cache; a GPU wants large launches.
CHUNK_ELEMENTS = {"cpu": 1 << 19}
DEFAULT_CHUNK_ELEMENTS = 1 << 26
ROWS = {"cpu": 32}
DEFAULT_ROWS = 128


def visual_attention_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    mean_heads: bool,
) -> torch.Tensor:
    """See :func:`llava_compodistill.ops.visual_attention.visual_attention_map`; arguments are already validated."""
    return _ChunkedVisualAttention.apply(query, key, visual_index, key_mask, scale, mean_heads)


class _Block(NamedTuple):
    """Samples [b0, b1), key/value heads [h0, h1), query rows [r0, r1)."""

    b0: int
    b1: int
    h0: int
    h1: int
    r0: int
    r1: int


class _ChunkedVisualAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, visual_index, key_mask, scale, mean_heads):
        ctx.save_for_backward(query, key, visual_index, key_mask)
        ctx.scale, ctx.mean_heads = scale, mean_heads
        run = _Run(query, key, visual_index, key_mask, scale, mean_heads)
        batch, num_heads, length, _ = query.shape
        if run.single and mean_heads:
            block = next(run.blocks(run.first_visual_rows()))
            return run.gather(run.probabilities(block).mean(dim=1), block)
        shape = (batch, length) if mean_heads else (batch, num_heads, length)
        out = torch.zeros(*shape, visual_index.shape[1], dtype=run.accumulate, device=query.device)
        for block in run.blocks(run.first_visual_rows()):
            probs = run.probabilities(block)  # [b, heads, rows, keys]
            if mean_heads:
                target = out[block.b0 : block.b1, block.r0 : block.r1]
                target.add_(run.gather(probs.sum(dim=1), block), alpha=1.0 / num_heads)
            else:
                heads = slice(block.h0 * run.group, block.h1 * run.group)
                out[block.b0 : block.b1, heads, block.r0 : block.r1] = run.gather(probs, block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, visual_index, key_mask = ctx.saved_tensors
        need_query, need_key = ctx.needs_input_grad[:2]
        # A backward pass may be started inside an autocast region; the products below choose their own precision.
        with torch.autocast(query.device.type, enabled=False):
            run = _Run(query, key, visual_index, key_mask, ctx.scale, ctx.mean_heads)
            grad_query, grad_key = run.gradients(grad, query.dtype, need_query, need_key)
        grad_key = None if grad_key is None else grad_key.to(key.dtype)
        return grad_query, grad_key, None, None, None, None


class _Run:
    """One pass over the blocks of one call: shapes, masks and the pieces that both passes share."""

    def __init__(self, query, key, visual_index, key_mask, scale, mean_heads):
        self.batch, self.num_heads, self.length, self.head_size = query.shape
        self.kv_heads = key.shape[1]
        self.group = self.num_heads // self.kv_heads
        self.scale, self.mean_heads = scale, mean_heads
        self.accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        # Tensor cores multiply bfloat16 and keep float32 sums. float16 is widened: gradients of a mean over many rows
        # fall below its smallest number. So is everything on a CPU, where nothing is gained by staying narrow.
        on_tensor_cores = query.is_cuda and query.dtype == torch.bfloat16 and _HAS_WIDE_BMM
        self.compute = query.dtype if on_tensor_cores else self.accumulate
        self.query, self.key = query.to(self.compute), key.to(self.compute)
        self.index = visual_index
        self.hidden_keys = None if key_mask is None else ~key_mask
        self.live_rows = None if key_mask is None else key_mask.cumsum(1) > 0  # rows that see at least one key

        device = query.device.type
        budget = CHUNK_ELEMENTS.get(device, DEFAULT_CHUNK_ELEMENTS)
        self.single = query.shape[0] * self.num_heads * self.length**2 <= budget
        if self.single:
            self.rows, self.heads_per_block, self.samples = self.length, self.kv_heads, self.batch
        else:
            self.rows = min(self.length, ROWS.get(device, DEFAULT_ROWS))
            one_head = self.group * self.rows * self.length
            self.heads_per_block = min(self.kv_heads, max(1, budget // one_head))
            whole = self.heads_per_block == self.kv_heads
            self.samples = min(self.batch, max(1, budget // (one_head * self.kv_heads))) if whole else 1
        self.future = torch.ones(self.rows, self.rows, dtype=torch.bool, device=query.device).triu(1)

    def blocks(self, first_rows: list[int], active: list[list[bool]] | None = None) -> Iterator[_Block]:
        """The blocks worth computing: past a sample's first visual key, and (backward) with a gradient."""
        for b0 in range(0, self.batch, self.samples):
            b1 = min(b0 + self.samples, self.batch)
            first = min(first_rows[b0:b1])
            for number, r0 in enumerate(range(0, self.length, self.rows)):
                r1 = min(r0 + self.rows, self.length)
                if r1 <= first or (active is not None and not any(active[b][number] for b in range(b0, b1))):
                    continue
                for h0 in range(0, self.kv_heads, self.heads_per_block):
                    yield _Block(b0, b1, h0, min(h0 + self.heads_per_block, self.kv_heads), r0, r1)

    def first_visual_rows(self) -> list[int]:
        """Per sample, the first row that can see a visual key (the sequence length where there is none)."""
        if self.single:  # one block: looking would cost more than skipping could save
            return [0] * self.batch
        if self.index.shape[1] == 0:
            return [self.length] * self.batch
        return self.index.masked_fill(self.index < 0, self.length).amin(dim=1).tolist()

    def active_rows(self, grad: torch.Tensor) -> list[list[bool]] | None:
        """[samples][row blocks]: whether any gradient reaches the block."""
        if self.single:
            return None
        rows = (grad != 0).any(dim=-1)
        rows = rows if self.mean_heads else rows.any(dim=1)
        rows = torch.nn.functional.pad(rows, (0, -self.length % self.rows))
        return rows.view(self.batch, -1, self.rows).any(dim=-1).tolist()

    def operands(self, block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
        """[b * kv heads, group * rows, d] and [b * kv heads, keys, d]: a group's query heads share one product."""
        b0, b1, h0, h1, r0, r1 = block
        query = self.query[b0:b1, h0 * self.group : h1 * self.group, r0:r1]
        key = self.key[b0:b1, h0:h1, :r1]
        count = (b1 - b0) * (h1 - h0)
        return query.reshape(count, -1, self.head_size), key.reshape(count, r1, self.head_size)

    def probabilities(self, block: _Block, operands: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """[b, heads, rows, keys]: softmax over the causal keys of the block."""
        query, key = operands or self.operands(block)
        scores = _product(query, key.transpose(1, 2), self.scale)
        b0, b1, h0, h1, r0, r1 = block
        scores = scores.view(b1 - b0, (h1 - h0) * self.group, r1 - r0, r1)
        lowest = torch.finfo(scores.dtype).min  # finite: a row without any key must not become NaN
        scores[..., r0:].masked_fill_(self.future[: r1 - r0, : r1 - r0], lowest)
        if self.hidden_keys is not None:
            scores.masked_fill_(self.hidden_keys[b0:b1, None, None, :r1], lowest)
        return torch.softmax(scores, dim=-1)

    def columns(self, block: _Block, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the visual keys (clamped to the block) and where they count, for ``ndim``-dimensional maps."""
        index = self.index[block.b0 : block.b1, None]  # [b, 1, N_v]
        counts = (index >= 0) & (index < block.r1)
        if self.live_rows is not None:
            counts = counts & self.live_rows[block.b0 : block.b1, block.r0 : block.r1, None]
        index = index.clamp(0, block.r1 - 1)
        return (index, counts) if ndim == 3 else (index.unsqueeze(1), counts.unsqueeze(1))

    def gather(self, probs: torch.Tensor, block: _Block) -> torch.Tensor:
        """The visual columns of [b, (heads,) rows, keys]."""
        index, counts = self.columns(block, probs.ndim)
        return probs.gather(-1, index.expand(*probs.shape[:-1], -1)).mul_(counts)

    def scatter(self, grad: torch.Tensor, block: _Block) -> torch.Tensor:
        """The reverse of ``gather``: the gradient on all keys of the block, [b, heads or 1, rows, keys]."""
        index, counts = self.columns(block, grad.ndim)
        dense = grad.new_zeros(*grad.shape[:-1], block.r1)
        dense.scatter_add_(-1, index.expand(*grad.shape[:-1], -1), grad * counts)
        return dense.unsqueeze(1) if self.mean_heads else dense

    def gradients(
        self, grad: torch.Tensor, dtype: torch.dtype, need_query: bool, need_key: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of query (``dtype``) and key (sums of many blocks, wide); None for one that is not needed."""
        device = grad.device
        grad_query = torch.zeros(self.query.shape, dtype=dtype, device=device) if need_query else None
        grad_key = torch.zeros(self.key.shape, dtype=self.accumulate, device=device) if need_key else None
        factor = self.scale / self.num_heads if self.mean_heads else self.scale
        for block in self.blocks(self.first_visual_rows(), self.active_rows(grad)):
            b0, b1, h0, h1, r0, r1 = block
            heads = slice(h0 * self.group, h1 * self.group)
            dense = self.scatter(grad[b0:b1, r0:r1] if self.mean_heads else grad[b0:b1, heads, r0:r1], block)
            query, key = operands = self.operands(block)
            probs = self.probabilities(block, operands)
            weighted = probs * dense
            delta = weighted.sum(dim=-1, keepdim=True)
            grad_scores = weighted.addcmul_(probs, delta, value=-1).view(*query.shape[:2], r1).to(self.compute)
            if grad_query is not None:
                part = _product(grad_scores, key, factor)
                grad_query[b0:b1, heads, r0:r1] = part.view(b1 - b0, -1, r1 - r0, self.head_size)
            if grad_key is not None:
                total = grad_key[b0:b1, h0:h1, :r1].view_as(key)
                _add_product(total, grad_scores.transpose(1, 2), query, factor)
        return grad_query, grad_key


# torch.bmm(..., out_dtype=torch.float32) for bfloat16 inputs: CUDA only, PyTorch 2.8 and later.
_HAS_WIDE_BMM = "dtype" in torch.ops.aten.bmm.overloads()


def _product(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha * left @ right; float32 for bfloat16 operands."""
    if left.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32).mul_(alpha)
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=alpha)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """total += alpha * left @ right, in place."""
    if left.dtype == torch.bfloat16:
        total.add_(torch.bmm(left, right, out_dtype=torch.float32), alpha=alpha)
    else:
        total.baddbmm_(left, right, alpha=alpha)
