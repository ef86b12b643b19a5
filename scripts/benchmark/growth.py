"""Suite growth: time and memory as the work grows, one size at a time, and the exponents: 1 where they double with the
size, 2 where they grow fourfold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import head as head_suite
import op as op_suite
import step as step_suite
import torch
from measure import compare, extra_memory
from pair import Pair
from presets import Preset

#: Of the preset's own size.
FACTORS = (0.5, 1.0, 2.0)
Work = Mapping[str, Callable[[], Any]]


def run(preset: Preset, pair: Pair, folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    device = pair.device
    base = preset.ops[min(1, len(preset.ops) - 1)]
    visual = base.visual // 2  # leaves room for lengths and for images of half and of twice the size
    shape = replace(base, visual=visual)
    yield from _refused(op_suite.parity(replace(shape, batch=1), device))
    for name, sizes in (("length", _scaled(base.length)), ("visual", _scaled(visual)), ("batch", (1, 2, 4))):
        shapes = {size: replace(shape, **{name: size}) for size in sizes}
        yield from _sweep(_SYMBOLS[name], {size: _maps(one, device) for size, one in shapes.items()}, device, seconds)
    first = preset.heads[0]
    yield from _refused(head_suite.parity(first, device))
    for name in ("positions", "answers", "vocab"):
        sizes = _scaled(getattr(first, name))
        shapes = {size: replace(first, **{name: size}) for size in sizes}
        yield from _sweep(_SYMBOLS[name], {size: _heads(one, device) for size, one in shapes.items()}, device, seconds)
    yield from _steps(pair, folder, seconds)


def _steps(pair: Pair, folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    steps = step_suite.variants(pair, folder)
    length = pair.spec.lengths[0]
    step_suite.parity(pair, steps, length)

    def work(size: int, length: int) -> Work:
        batch = pair.batch(size, length)
        return {f"step, {name}": lambda step=step: step(batch) for name, step in steps.items()}

    yield from _sweep("N", {n: work(1, n) for n in (length, 2 * length, 4 * length)}, pair.device, seconds)
    yield from _sweep("B", {size: work(size, length) for size in (1, 2, 4)}, pair.device, seconds)
    layers = min(pair.spec.student.layers, pair.spec.teacher.layers)
    aligned = {}
    for count in sorted({1, max(1, layers // 2), layers}):
        names = ",".join(map(str, range(count)))
        step = step_suite.our_step(pair, folder, student_layers=names, teacher_layers=names)
        aligned[count] = {"step, ours": lambda step=step: step(pair.batch(1, length))}
    yield from _sweep("layers aligned", aligned, pair.device, seconds)


#: What a size is called in tables.
_SYMBOLS = {
    "length": "N",
    "visual": "N_v",
    "batch": "B",
    "positions": "positions",
    "answers": "answer rows",
    "vocab": "V",
}


def _scaled(size: int) -> tuple[int, ...]:
    return tuple(round(size * factor) for factor in FACTORS)


def _maps(shape: op_suite.Shape, device: torch.device) -> Work:
    query, key, index, upstream = shape.tensors(device)

    def both(impl: str) -> Any:
        attention = op_suite.visual_attention_map(query, key, index, impl=impl)
        return torch.autograd.grad(attention, (query, key), upstream.to(attention.dtype))

    return {f"map, {name}": lambda name=name: both(name) for name in op_suite.implementations(device)}


def _heads(shape: head_suite.Shape, device: torch.device) -> Work:
    inputs = head_suite.Inputs(shape, device)
    kinds = {"all positions": head_suite.all_positions, "ours": head_suite.ours}
    return {f"head, {name}": lambda kind=kind: inputs.gradients(kind(inputs)) for name, kind in kinds.items()}


def _refused(errors: Mapping[str, tuple[bool, float]]) -> Iterator[dict[str, Any]]:
    """Rows of what fails its parity, which ends the run with an error."""
    for name, (wrong, error) in errors.items():
        if wrong:
            yield {"suite": "growth", "variant": name, "parity": f"FAILED {error:.1e}"}


def _sweep(what: str, works: Mapping[int, Work], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each size and variant, then one for each variant with its exponents."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for size, work in works.items():
        times = compare(dict(work), device, seconds / len(works), rounds=3)
        for name, (p20, p50, p80) in times.items():
            memory = extra_memory(work[name], device)
            found.setdefault(name, []).append((size, p50, memory))
            row = {"suite": "growth", "variant": name, "note": f"{what} = {size:,}"}
            yield {**row, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "extra_mib": memory}
    for name, points in found.items():
        sizes, times_, memories = zip(*points, strict=True)
        yield {
            "suite": "growth",
            "variant": name,
            "note": f"{what}: {sizes[0]:,} to {sizes[-1]:,}",
            "time_exponent": exponent(sizes, times_),
            "memory_exponent": exponent(sizes, memories),
        }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope
