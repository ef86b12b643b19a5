"""The visual attention map with Triton kernels: no attention matrix, one pass over the keys for each product.

Forward: the log-sum-exp of every row over all its keys, then probabilities at the visual keys alone, summed over the
heads by the program that writes them. Backward, with P made again from the log-sum-exp and g = 0 off the visual keys:

    D_i  = sum_j P_ij g_ij
    dS   = P * (g - D)          over ALL keys
    dq   = scale * dS k,        dk = scale * dS^T q        (divided by H for a mean over heads)

Row tiles whose incoming gradient is 0 are skipped. No sum depends on the order in which programs run, so equal inputs
give equal bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .key_lists import KeyLists, key_lists

HEAD_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# float16 loses numbers below 2**-24, and gradients of a mean over many rows are such numbers. The largest gradient of
# a sample is brought to 2**14 inside the kernels: |P * (g - D)| <= 2 * max |g| then stays below 2**16.
FLOAT16_TARGET = 14


class Tiles(NamedTuple):
    """Rows and columns (keys) of a program's tile, and Triton's launch options."""

    rows: int
    columns: int
    warps: int
    stages: int


class TileSet(NamedTuple):
    """Tiles of each kernel. `grad_query.rows` must be a multiple of `grad_key.rows`, the unit of skipped rows."""

    lse: Tiles
    map: Tiles
    grad_query: Tiles
    grad_key: Tiles


# 16 bit inputs, by head size, for 160 KiB of shared memory a block (A100, H100, H200) ...
LARGE = {
    64: TileSet(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
    128: TileSet(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
    256: TileSet(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
}
# ... and for the 99 KiB of other cards.
SMALL = {
    64: TileSet(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: TileSet(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    256: TileSet(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
# float32 products run without tensor cores, where large tiles only spill registers.
FLOAT32 = TileSet(*[Tiles(32, 32, 8, 1)] * 4)


def visual_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    mean_heads: bool,
    in_order: bool = False,
) -> torch.Tensor:
    """See :func:`llava_compodistill.ops.visual_attention.visual_attention_map`; arguments are already validated.

    Raises ``RuntimeError`` where the kernels cannot run and ``ValueError`` for what they do not support.
    """
    if problem := missing(query.device):
        raise RuntimeError(f"impl='triton' cannot run: {problem}")
    if problem := unsupported(query):
        raise ValueError(f"impl='triton' {problem}")
    lists = key_lists(visual_index, key_mask, query.shape[2], in_order)
    out = _FusedVisualAttention.apply(query, key, lists, scale, mean_heads)
    if lists.column is None:
        return out
    # One column more, of zeros, answers columns that ask for nothing. (The gradient of a position that is asked for
    # three times or more is a sum in whatever order PyTorch takes; models ask once.)
    column = lists.column.unsqueeze(1) if mean_heads else lists.column[:, None, None]
    return torch.nn.functional.pad(out, (0, 1)).gather(-1, column.expand(*out.shape[:-1], -1))


@functools.cache
def missing(device: torch.device) -> str | None:
    """What keeps the kernels from running on a device, or None."""
    try:
        import triton

        from . import kernels
    except Exception as error:  # a damaged installation must not take the other implementations with it
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed (it comes with CUDA builds of torch; pip install triton)"
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if int(triton.__version__.split(".")[0]) < 3:
        return f"Triton 3.0 or later is needed, found {triton.__version__}"
    if kernels.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"a CUDA device is missing, the query is on {device} (Triton's interpreter needs TRITON_INTERPRET=1)"
    if torch.version.hip:
        return "it is not tested on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or later, which {device} has not"
    return None


def unsupported(query: torch.Tensor) -> str | None:
    """What the kernels do not support about these inputs, or None."""
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"takes {names}, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] not in HEAD_SIZES:
        return f"takes head sizes {', '.join(map(str, HEAD_SIZES))}, got {query.shape[-1]}"
    return None


def tiles_for(dtype: torch.dtype, head_size: int, shared_memory: int) -> TileSet:
    """The tiles for a dtype, a head size and the shared memory (bytes) that a block may have."""
    if dtype == torch.float32:
        return FLOAT32
    return (LARGE if shared_memory >= 160 * 1024 else SMALL)[max(head_size, 64)]


class _Launcher:
    """What the kernels of one call share: tiles, strides, sizes."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, lists: KeyLists, scale: float, mean_heads: bool):
        # A last dimension with gaps does not occur in models; the kernels take the others as they are.
        self.query = query if query.stride(-1) == 1 else query.contiguous()
        self.key = key if key.stride(-1) == 1 else key.contiguous()
        self.lists, self.mean_heads = lists, mean_heads
        self.batch, self.heads, self.length, self.head_size = query.shape
        self.kv_heads, self.num_visual = key.shape[1], lists.visual.shape[1]
        self.group = self.heads // self.kv_heads
        self.scale = scale * math.log2(math.e)
        self.factor = scale / self.heads if mean_heads else scale
        self.tiles = tiles_for(query.dtype, self.head_size, _shared_memory(query.device))
        self.strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        from . import kernels  # imports Triton, which the package does without

        self.kernels = kernels
        self.wide = query.dtype == torch.bfloat16 and kernels.INTERPRETED

    def options(self, tiles: Tiles) -> dict:
        return dict(
            D=self.head_size, COLUMNS=tiles.columns, WIDE=self.wide, num_warps=tiles.warps, num_stages=tiles.stages
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The map and the log-sum-exp [B, H, N]."""
        kernels, lists, device = self.kernels, self.lists, self.query.device
        lse = torch.empty(self.batch, self.heads, self.length, dtype=torch.float32, device=device)
        lead = (self.batch, self.length) if self.mean_heads else (self.batch, self.heads, self.length)
        out = torch.empty(*lead, self.num_visual, dtype=torch.float32, device=device)
        sizes = (*self.strides, self.heads, self.group, self.length, self.num_visual, self.scale)
        with torch.cuda.device_of(self.query):
            tiles = self.tiles.lse
            kernels.lse_kernel[(self.heads, _cdiv(self.length, tiles.rows), self.batch)](
                self.query, self.key, lse, lists.visual, lists.visual_before, lists.other, lists.other_before, *sizes,
                ROWS=tiles.rows, **self.options(tiles),
            )  # fmt: skip
            tiles = self.tiles.map
            planes = self.batch if self.mean_heads else self.batch * self.heads
            grid = (_cdiv(self.num_visual, tiles.columns), _cdiv(self.length, tiles.rows), planes)
            kernels.map_kernel[grid](
                self.query, self.key, lse, out, lists.visual, *sizes,
                ROWS=tiles.rows, MEAN=self.mean_heads, **self.options(tiles),
            )  # fmt: skip
        return out, lse

    def backward(
        self, grad: torch.Tensor, lse: torch.Tensor, need_query: bool, need_key: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        kernels, lists = self.kernels, self.lists
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_strides = (grad.stride(0), 0 if self.mean_heads else grad.stride(1), grad.stride(-2))
        active, active_before, shift = self.active_rows(grad, self.tiles.grad_key.rows)
        delta = torch.empty_like(lse)
        # Rows and keys that no gradient reaches are never written.
        grad_query = torch.zeros_like(self.query) if need_query else self.query
        grad_key = torch.zeros_like(self.key) if need_key else None
        with torch.cuda.device_of(self.query):
            tiles = self.tiles.grad_query
            kernels.grad_query_kernel[(self.heads, _cdiv(self.length, tiles.rows), self.batch)](
                self.query, self.key, lse, delta, grad, grad_query,
                lists.visual, lists.visual_before, lists.other, lists.other_before, active_before, shift,
                *self.strides, *grad_strides, *grad_query.stride()[:3],
                self.heads, self.group, self.length, self.num_visual, self.scale, self.factor, active.shape[1],
                ROWS=tiles.rows, TILE=self.tiles.grad_key.rows, NEED_QUERY=need_query, **self.options(tiles),
            )  # fmt: skip
            if not need_key:
                return grad_query if need_query else None, None
            tiles = self.tiles.grad_key
            for visual in (True, False):
                positions = lists.visual if visual else lists.other
                before = lists.visual_before if visual else lists.other_before
                grid = (self.kv_heads, _cdiv(positions.shape[1], tiles.columns), self.batch)
                kernels.grad_key_kernel[grid](
                    self.query, self.key, lse, delta, grad, grad_key, positions, before, active, active_before, shift,
                    *self.strides, *grad_strides, *grad_key.stride()[:3],
                    self.heads, self.group, self.length, positions.shape[1], self.scale, self.factor, active.shape[1],
                    VISUAL=visual, TILE=tiles.rows, **self.options(tiles),
                )  # fmt: skip
        return grad_query if need_query else None, grad_key

    def active_rows(self, grad: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The row tiles with a gradient, found without waiting for the device.

        Returns:
            [B, T] int32, numbers of the tiles that have one, ascending (T where there are no more); [B, T + 1] int32,
            how many of them come before a tile; [B] float32, the exponent of the factor on the gradient (0 but for
            float16).
        """
        largest = torch.linalg.vector_norm(grad, math.inf, dim=-1)
        largest = largest if self.mean_heads else largest.amax(dim=1)
        rows = (largest != 0) & (self.lists.visual_before > 0)
        count = _cdiv(self.length, tile)
        tiles = torch.nn.functional.pad(rows, (0, count * tile - self.length)).view(self.batch, count, tile).any(-1)
        numbers = torch.arange(count, device=grad.device)
        active = torch.where(tiles, numbers, count).sort(dim=1).values.int()
        before = torch.nn.functional.pad(tiles.cumsum(1, dtype=torch.int32), (1, 0))
        if self.query.dtype == torch.float16:
            shift = FLOAT16_TARGET - largest.amax(dim=1).clamp(min=1e-30).log2()
        else:
            shift = torch.zeros(self.batch, device=grad.device)
        return active, before, shift


class _FusedVisualAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, lists, scale, mean_heads):
        ctx.lists, ctx.scale, ctx.mean_heads = lists, scale, mean_heads
        if lists.visual.shape[1] == 0:
            lead = query.shape[:1] + query.shape[2:3] if mean_heads else query.shape[:3]
            out, lse = torch.zeros(*lead, 0, dtype=torch.float32, device=query.device), None
        else:
            out, lse = _Launcher(query, key, lists, scale, mean_heads).forward()
        ctx.save_for_backward(query, key, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, lse = ctx.saved_tensors
        if lse is None:
            return torch.zeros_like(query), torch.zeros_like(key), None, None, None
        launcher = _Launcher(query, key, ctx.lists, ctx.scale, ctx.mean_heads)
        return *launcher.backward(grad, lse, *ctx.needs_input_grad[:2]), None, None, None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    # Older torch does not tell: assume the little that every card has.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
