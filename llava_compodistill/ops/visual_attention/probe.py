"""The Triton kernels' answer to a small question, compared with the readable implementation's before "auto" uses them.

A card, a driver or a release of Triton that nobody has tried must cost speed, not the run, and never the result.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from .eager import visual_attention_eager
from .fused import visual_attention_triton

#: Largest error allowed, relative to the largest entry: rounding alone stays several times below.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@functools.cache
def disagreement(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """What is wrong with the kernels on a device, or None. Asked once for each device, dtype and head size."""
    # In a thread of its own: the caller's grad mode, autocast and the hooks of gradient checkpointing stay outside.
    with ThreadPoolExecutor(1) as thread:
        try:
            error = thread.submit(_largest_error, device, dtype, head_size).result()
        except Exception as failure:
            reason = (str(failure).strip().splitlines() or [""])[0]
            return f"its kernels fail on {device} ({type(failure).__name__}: {reason})"
    if error <= ALLOWED[dtype]:
        return None
    return f"its kernels are wrong on {device} for {dtype} and head size {head_size} (relative error {error:.1e})"


def _largest_error(device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """Of map, query gradient and key gradient, over several tiles, two heads on one key head and a padded column. The
    truth is float64's: under `--tf32` a product in float32 rounds more than the kernels do, and they would be blamed.
    """
    generator = torch.Generator().manual_seed(0)
    length = 150
    query = torch.randn(1, 2, length, head_size, generator=generator).to(dtype)
    key = torch.randn(1, 1, length, head_size, generator=generator).to(dtype)
    index = torch.tensor([[*range(3, 100), -1]], device=device)
    weight = torch.randn(1, length, index.shape[1], generator=generator).to(device)
    answers = []
    for attend, precision in ((visual_attention_triton, dtype), (visual_attention_eager, torch.float64)):
        inputs = [part.to(device, precision).requires_grad_() for part in (query, key)]
        attention = attend(*inputs, index, None, head_size**-0.5, True)
        gradients = torch.autograd.grad((attention * weight).sum(), inputs)
        answers.append([part.detach().float() for part in (attention, *gradients)])
    return max(((found - true).abs().max() / true.abs().max()).item() for found, true in zip(*answers, strict=True))
