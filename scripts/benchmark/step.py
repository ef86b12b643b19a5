"""Suites step, fit and profile: a whole DFT step of teacher and student, the usual way and ours.

The step is forward and backward of one micro-batch. The optimizer's step comes once for many micro-batches, is the
same for all variants and is left out, as are its states: with ZeRO they lie spread over the cards.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import compare, extra_memory, matrix_rate, synchronize
from pair import IGNORE_INDEX, Kept, Pair

from llava_compodistill.methods import find_method
from llava_compodistill.pair.layers import match_layers, visual_understanding_layers
from llava_compodistill.record.compiled import compiled_layers
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective


def objective(pair: Pair, folder: str, **options: Any) -> Objective:
    options = {"stage": "dft", **options}
    arguments = TrainingArguments(output_dir=folder, report_to="none", use_cpu=pair.device.type == "cpu", **options)
    terms = find_method(arguments.method).terms(arguments.stage, arguments)
    teacher = None if arguments.stage in ("pt", "sft") else pair.teacher
    given = terms, pair.spec.student.vocab, arguments.attention_map_impl
    return Objective(pair.student, teacher, *given, padding_free=arguments.padding_free)


def our_step(pair: Pair, folder: str, **options: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """One micro-batch through the package's own objective, as the trainer runs it."""
    goal, known = objective(pair, folder, **options), Kept(pair.spec.tower.patches)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = (batch["labels"] != IGNORE_INDEX).sum()
        with goal.running(), known(batch):
            counts = {"answer_tokens": rows, "image_samples": len(batch["input_ids"])}
            sums = goal(pair.student, {**batch, "use_cache": False})
            losses = {term: sums[term.name].loss for term in goal.terms if sums[term.name].loss is not None}
            loss = sum(term.weight * value / counts[term.count] for term, value in losses.items())
            loss.backward()
        return loss.detach()

    return step


def usual_step(pair: Pair) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The same losses as public attention distillation code computes them: eager attention that returns the
    probabilities of every layer of both models, logits of every position of both, each model its own encoder run."""
    students = visual_understanding_layers(pair.spec.student.layers)
    groups = match_layers(students, visual_understanding_layers(pair.spec.teacher.layers))
    visual = slice(4, 4 + pair.spec.tower.patches)  # where the batches have their image

    def maps(attentions: tuple[torch.Tensor, ...], layers: list[int]) -> torch.Tensor:
        return torch.stack([attentions[layer].mean(dim=1)[:, :, visual].float() for layer in layers]).mean(dim=0)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {**batch, "use_cache": False}
        labels = batch.pop("labels")
        for model in (pair.student, pair.teacher):
            model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                teacher = pair.teacher(**batch, output_attentions=True)
            student = pair.student(**batch, output_attentions=True)
            text = labels.shape[1]
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            # The image stands before the answers: the last positions of the merged sequence are the text's.
            logits = student.logits.float()
            log_q = F.log_softmax(logits, dim=-1)
            log_p = F.log_softmax(teacher.logits.float(), dim=-1)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
            answer = targets != IGNORE_INDEX
            loss = F.cross_entropy(logits[:, -text:].flatten(0, 1), targets, ignore_index=IGNORE_INDEX)
            loss = loss + (divergence[:, -text:].flatten() * answer).sum() / answer.sum()
            for layer, group in zip(students, groups, strict=True):
                mine, target = maps(student.attentions, [layer]), maps(teacher.attentions, group)
                rows = slice(4, None)  # those that see the image
                cosine = F.cosine_similarity(mine[:, rows], target[:, rows], dim=-1)
                loss = loss + (1 - cosine.mean()) / len(students)
            loss.backward()
        finally:
            for model in (pair.student, pair.teacher):
                model.set_attn_implementation("sdpa")
        return loss.detach()

    return step


def variants(pair: Pair, folder: str) -> dict[str, Callable]:
    return {
        "usual": usual_step(pair),
        "KD only": our_step(pair, folder, vat=False),
        "ours": our_step(pair, folder),
    }


#: The order of suite fit, whose variants come one after the other and take minutes: what matters most comes first.
_BY_WORTH = ("ours", "usual", "KD only")


def gradients(pair: Pair, step: Callable, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    pair.student.zero_grad(set_to_none=True)
    loss = step(batch).item()
    found = {name: p.grad.clone() for name, p in pair.student.named_parameters() if p.grad is not None}
    pair.student.zero_grad(set_to_none=True)
    return loss, found


def parity(pair: Pair, steps: dict[str, Callable], length: int) -> float:
    """Difference of all gradients between the usual way and ours, relative to their norm.

    Raises SystemExit where they do not compute the same: no speed is reported then. Both run in the pair's dtype, so
    16-bit gradients differ by their rounding; in float32 each parameter's gradient must agree by itself.
    """
    batch = pair.batch(1, length)
    (usual, theirs), (loss, mine) = (gradients(pair, steps[name], batch) for name in ("usual", "ours"))
    wide = pair.spec.dtype == torch.float32
    if abs(loss - usual) > (1e-4 if wide else 2e-2) * abs(usual):
        raise SystemExit(f"parity failed: the usual step's loss is {usual}, ours {loss}")
    worst, apart, whole = 0.0, 0.0, 0.0
    for name, gradient in theirs.items():
        size = gradient.float().norm().item()
        difference = (mine[name].float() - gradient.float()).norm().item()
        worst, apart, whole = max(worst, difference / max(size, 1e-12)), apart + difference**2, whole + size**2
    overall = (apart / whole) ** 0.5
    if overall > (1e-3 if wide else 0.05) or (wide and worst > 1e-3):
        raise SystemExit(f"parity failed: the gradients differ by {overall:.2g} of their norm, one by {worst:.2g}")
    return overall


def run(pair: Pair, folder: str, batches: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Suite step: time and memory at given micro-batches and lengths."""
    spec, device = pair.spec, pair.device
    rate = matrix_rate(device, spec.dtype)
    steps = variants(pair, folder)
    for length in spec.lengths:
        error = parity(pair, steps, length)
        for size in batches:
            batch = pair.batch(size, length)
            work = {name: lambda step=step, batch=batch: step(batch) for name, step in steps.items()}
            fitting = {name: call for name, call in work.items() if fits(call, device)}
            times = compare(fitting, device, seconds) if fitting else {}
            for name in work:
                row = {**columns(pair, size, length), "suite": "step", "variant": name, "parity": f"{error:.1e}"}
                if name not in fitting:
                    yield {**row, "note": "out of memory"}
                    continue
                p20, p50, p80 = times[name]
                share = spec.flops(size, length) / (p50 / 1e3) / rate
                memory = extra_memory(fitting[name], device)
                times_row = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "extra_mib": memory}
                times_row |= {"flops_share": share, "limit_ms": share * p50}
                yield {**row, **times_row, "samples_per_s": 1e3 * size / p50}
                pair.student.zero_grad(set_to_none=False)


def run_fit(pair: Pair, folder: str, limits: list[float], seconds: float) -> Iterator[dict[str, Any]]:
    """Suite fit: the largest micro-batch within a memory limit (GiB, all of the process's tensors), and the best
    throughput of the micro-batches 1, 4, 16, ... that fit, and of the largest."""
    spec, device = pair.spec, pair.device
    steps = variants(pair, folder)
    for length in spec.lengths:
        error = parity(pair, steps, length)
        for name in _BY_WORTH:
            step = steps[name]
            needs = functools.cache(lambda size, step=step, length=length: total_gib(pair, step, size, length))
            for limit in limits:
                largest = _largest(needs, limit)
                sizes = [4**power for power in range(6) if 4**power <= largest]
                best = (0.0, 0)
                for size in sorted({*sizes, largest} - {0}):
                    batch = pair.batch(size, length)
                    _, p50, _ = compare({name: lambda step=step, batch=batch: step(batch)}, device, seconds)[name]
                    best = max(best, (1e3 * size / p50, size))
                yield {
                    **columns(pair, largest, length),
                    "suite": "fit",
                    "variant": name,
                    "parity": f"{error:.1e}",
                    "samples_per_s": best[0],
                    "note": f"within {limit:g} GiB; fastest at micro-batch {best[1]}",
                }


def run_profile(pair: Pair, folder: str, size: int, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Suite profile: the operators that take more than 2 % of our step by themselves."""
    from torch.profiler import ProfilerActivity, profile

    step, device = our_step(pair, folder), pair.device
    cuda = device.type == "cuda"
    for length in pair.spec.lengths:
        batch = pair.batch(size, length)
        step(batch)
        synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                step(batch)
            synchronize(device)
        averages = profiler.key_averages()
        own = {item.key: item.self_device_time_total if cuda else item.self_cpu_time_total for item in averages}
        total = sum(own.values())
        for key, value in sorted(own.items(), key=lambda item: -item[1]):
            if value > 0.02 * total:
                row = {**columns(pair, size, length), "suite": "profile", "variant": key[:80]}
                yield {**row, "p50_ms": value / 1e3 / repeats, "note": f"{100 * value / total:.1f} % of the step"}


def run_compiled(pair: Pair, folder: str, size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Suite compile: our step, and the same with --compile_layers student, teacher and both."""
    device = pair.device
    for length in pair.spec.lengths:
        batch = pair.batch(size, length)
        step = our_step(pair, folder)
        truth, reference = gradients(pair, step, batch)
        for name, models in (
            ("ours", []),
            ("student compiled", [pair.student]),
            ("teacher compiled", [pair.teacher]),
            ("both compiled", [pair.student, pair.teacher]),
        ):
            row = {**columns(pair, size, length), "suite": "compile", "variant": name}
            compiling = contextlib.ExitStack()
            try:
                for model in models:
                    compiling.enter_context(compiled_layers(model))
                begin = time.perf_counter()
                loss, found = gradients(pair, step, batch)
                first = time.perf_counter() - begin
                error = max(
                    ((found[n].float() - g.float()).norm() / g.float().norm().clamp(min=1e-12)).item()
                    for n, g in reference.items()
                )
                if abs(loss - truth) > 2e-2 * abs(truth):
                    yield {**row, "parity": f"FAILED {loss} is not {truth}"}
                    continue
                p20, p50, p80 = compare({name: lambda batch=batch, step=step: step(batch)}, device, seconds)[name]
                memory = extra_memory(lambda batch=batch, step=step: step(batch), device)
                figures = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "extra_mib": memory, "parity": f"{error:.1e}"}
                yield {**row, **figures, "samples_per_s": 1e3 * size / p50, "note": f"first step {first:.0f} s"}
            except Exception as error:  # what a compiler may raise is its own affair; the figure is that it fails
                yield {**row, "note": f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            finally:
                compiling.close()
                torch._dynamo.reset()
                pair.student.zero_grad(set_to_none=True)


def columns(pair: Pair, size: int, length: int) -> dict[str, Any]:
    def text(model: Any) -> str:
        return f"{model.layers}x{model.hidden}"

    spec = pair.spec
    return {
        "batch": size,
        "length": length,
        "visual": spec.tower.patches,
        "rows": size * spec.answers,
        "vocab": spec.student.vocab,
        "teacher": text(spec.teacher),
        "student": text(spec.student),
        "dtype": str(spec.dtype).removeprefix("torch."),
    }


def _largest(needs: Callable[[int], float], limit: float, most: int = 4096) -> int:
    """The largest micro-batch within a limit; 0 where not even one sample fits.

    Memory is nearly a line over the micro-batch: each guess is where the line through the largest that fits and its
    neighbour meets the limit, so that few large ones are run.

    Args:
        needs: of a micro-batch, infinite where the device has not enough.
    """
    low, high = 0, most + 1  # what fits, and what does not
    points: list[tuple[int, float]] = []
    guess, tries = 1, 0
    while high - low > 1:
        used, tries = needs(guess), tries + 1
        low, high = (guess, high) if used <= limit else (low, guess)
        points = sorted({*points, (guess, used)} - {(guess, float("inf"))})
        guess = 2 * guess if high > most else (low + high) // 2
        if len(points) > 1 and used < float("inf") and tries < 8:
            (size, most_used), (other, less) = points[-1], points[-2]
            if most_used > less:
                guess = int(size + (limit - most_used) * (size - other) / (most_used - less))
        guess = max(low + 1, min(high - 1, guess))
    return low


def fits(call: Callable[[], Any], device: torch.device) -> bool:
    try:
        call()
        synchronize(device)
    except torch.cuda.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return False
    return True


def total_gib(pair: Pair, step: Callable, size: int, length: int) -> float:
    """Memory of models, gradients and one step at its peak; infinite where the device has not enough."""
    pair.student.zero_grad(set_to_none=True)
    batch = pair.batch(size, length)
    peak: list[float] = []

    def measure() -> None:
        step(batch)  # the gradients are there from now on
        peak.append(extra_memory(lambda: step(batch), pair.device))

    if not fits(measure, pair.device):
        return float("inf")
    tensors = {p.data_ptr(): p.nbytes for m in (pair.teacher, pair.student) for p in m.parameters()}
    gradient = sum(p.grad.nbytes for p in pair.student.parameters() if p.grad is not None)
    return (sum(tensors.values()) + gradient + peak[0] * 2**20) / 2**30
