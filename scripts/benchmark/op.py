"""Suite op: the visual attention map, forward and backward, one row an implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import compare, extra_memory, limit_ms

from llava_compodistill.ops.visual_attention import fused, visual_attention_map


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_size: int
    visual: int
    dtype: torch.dtype

    def tensors(self, device: torch.device, batch: int | None = None, dtype: torch.dtype | None = None):
        """query, key, visual_index and the gradient that arrives at the map; the same numbers for every dtype."""
        batch = batch or self.batch
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            values = torch.randn(*size, generator=generator, device=device).to(self.dtype)
            return values.to(dtype or self.dtype)

        query = normal(batch, self.heads, self.length, self.head_size).requires_grad_()
        key = normal(batch, self.kv_heads, self.length, self.head_size).requires_grad_()
        start = min(35, self.length - self.visual)  # a system prompt comes before the image
        index = torch.arange(start, start + self.visual, device=device).repeat(batch, 1)
        upstream = torch.randn(batch, self.length, self.visual, generator=generator, device=device)
        return query, key, index, upstream

    def columns(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "length": self.length,
            "visual": self.visual,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def limit(self, device: torch.device, backward: bool) -> float:
        """Least ms: scores of all that a query sees, once, for their sum; with gradients once more, and a product each
        for query and key. Causal, so half of N^2. Reads query and key and writes the map, or their gradients."""
        pairs = self.batch * self.heads * self.length**2 / 2
        products = 2 * pairs * self.head_size * (4 if backward else 1)
        size = torch.finfo(self.dtype).bits // 8
        given = self.batch * self.length * self.head_size * (self.heads + self.kv_heads) * size
        moved = given + 4 * self.batch * self.length * self.visual
        return limit_ms(products, moved * (2 if backward else 1), device, self.dtype)


def implementations(device: torch.device) -> list[str]:
    names = ["eager", "chunked"]
    if device.type == "cuda":
        problem = fused.missing(device)
        if problem is None:
            names.append("triton")
        else:
            print(f"triton is left out: {problem}")
    return names


def run(shapes: list[Shape], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        errors = parity(shape, device)
        query, key, index, upstream = shape.tensors(device)

        def both(impl: str, query=query, key=key, index=index, upstream=upstream):
            attention = visual_attention_map(query, key, index, impl=impl)
            return torch.autograd.grad(attention, (query, key), upstream.to(attention.dtype))

        def forward(impl: str, query=query, key=key, index=index):
            with torch.no_grad():
                return visual_attention_map(query, key, index, impl=impl)

        right = [name for name, (wrong, _) in errors.items() if not wrong]
        for mode, call in (("forward", forward), ("forward+backward", both)):
            times = compare({name: lambda name=name, call=call: call(name) for name in right}, device, seconds)
            for name, (wrong, error) in errors.items():
                row = {"suite": "op", "variant": name, "note": mode, "parity": f"{error:.1e}", **shape.columns()}
                if wrong:
                    yield {**row, "parity": f"FAILED {error:.1e}"}
                    continue
                p20, p50, p80 = times[name]
                memory = extra_memory(lambda name=name, call=call: call(name), device)
                least = shape.limit(device, mode != "forward")
                figures = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "limit_ms": least, "extra_mib": memory}
                yield {**row, **figures}


def parity(shape: Shape, device: torch.device) -> dict[str, tuple[bool, float]]:
    """Of each implementation: whether it is further from the float64 truth than eager in the same dtype (plus
    rounding), and its largest error relative to the largest entry. One sample, map and both gradients."""

    def answers(impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        query, key, index, upstream = shape.tensors(device, batch=1, dtype=dtype)
        attention = visual_attention_map(query, key, index, impl=impl)
        gradients = torch.autograd.grad(attention, (query, key), upstream.to(attention.dtype))
        return [attention.detach(), *gradients]

    truth = answers("eager", torch.float64)
    tolerance = max(torch.finfo(shape.dtype).eps, 2e-6)

    def errors(found: list[torch.Tensor]) -> list[float]:
        return [((part - true).abs().max() / true.abs().max()).item() for part, true in zip(found, truth, strict=True)]

    reference = errors(answers("eager"))
    result = {}
    for name in implementations(device):
        mine = errors(answers(name))
        wrong = any(error > usual + tolerance for error, usual in zip(mine, reference, strict=True))
        result[name] = wrong, max(mine)
    return result
