"""A plan as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .memory import PHASES
from .planner import Request, StagePlan
from .setup import GIB

HOUR = 3600.0


def as_json(request: Request, plans: Sequence[StagePlan], lines: Sequence[str]) -> dict[str, Any]:
    """The plan for machines: sizes in GiB, times in hours."""
    return {
        "fits": all(plan.fits for plan in plans),
        "assumptions": assumptions(request, plans),
        "stages": [_stage(request, plan, line) for plan, line in zip(plans, lines, strict=True)],
    }


def _stage(request: Request, plan: StagePlan, line: str) -> dict[str, Any]:
    setup = plan.setup
    hours = plan.seconds / HOUR
    return {
        "stage": plan.name,
        "fits": plan.fits,
        "batch": setup.batch,
        "accumulation": setup.accumulation,
        "global_batch": plan.global_batch,
        "length": setup.length,
        "zero": setup.zero,
        "gradient_checkpointing": setup.checkpointing,
        "lora_rank": setup.lora_rank,
        "dtype": setup.dtype,
        "teacher_dtype": setup.teacher_dtype if setup.has_teacher else None,
        "trained_parameters": plan.trained,
        "peak_gib": plan.total / GIB,
        "peak_at": PHASES[plan.moment],
        "memory_gib": {term: size / GIB for term, size in plan.terms.items()},
        "moments_gib": {PHASES[name]: size / GIB for name, size in plan.moments.items()},
        "eager_maps_gib": None if plan.eager is None else [size / GIB for size in plan.eager],
        "samples": plan.samples,
        "mean_length": plan.mean_length,
        "answer_tokens": plan.answers,
        "steps": plan.steps,
        "tflop_per_sample": plan.executed / 1e12,
        "useful_tflop_per_sample": plan.useful / 1e12,
        "seconds_per_step": plan.seconds / plan.steps,
        "hours": hours,
        "gpu_hours": hours * request.machine.gpus,
        "changes": [asdict(change) for change in plan.changes],
        "launch": line,
    }


def assumptions(request: Request, plans: Sequence[StagePlan]) -> list[str]:
    """What the plan takes for granted, a sentence each."""
    machine = request.machine
    if machine.measured:
        rates = ", ".join(f"{stage} {rate / 1e12:.3g}" for stage, rate in machine.measured.items())
        speed = f"Speed: measured, in TFLOP/s of a GPU: {rates} (calibration file)."
    else:
        speed = (
            f"Speed: {machine.mfu:.0%} of {machine.tflops:g} TFLOP/s (--mfu, --gpu-tflops), recomputation counted as "
            "work. Padding, reading data, saving and waiting for other GPUs are not counted."
        )
    lengths = "; ".join(
        f"{plan.name} {plan.mean_length} tokens on average, {plan.answers} of them answers, at most "
        f"{plan.setup.length}"
        for plan in plans
    )
    found = [
        f"Reserve: {machine.reserve:.1f} GiB of each GPU for the CUDA context, communication, workspaces and "
        "fragmentation (--reserve).",
        speed,
        f"Samples, image included: {lengths} (--text-tokens, --answer-tokens, --max-length). Memory is that of a "
        "micro-batch of the longest.",
    ]
    if any(plan.setup.has_teacher for plan in plans):
        found.append(
            "The teacher is whole on every GPU (--teacher_placement replicate); auto, the default, spreads or "
            "offloads its layers where weights take more than 75% of a GPU."
        )
    if request.models.student.kv_heads < request.models.student.heads:
        found.append(
            "Keys and values of grouped heads are not expanded, as in current transformers; 4.37 expands them."
        )
    return found


def print_tables(request: Request, plans: Sequence[StagePlan], lines: Sequence[str]) -> None:
    """The plan for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    machine = request.machine

    def table(title: str) -> Table:
        result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        result.add_column("")
        for plan in plans:
            result.add_column(plan.name.upper(), justify="right")
        return result

    memory = table(f"Memory of a GPU in GiB, at the peak ({machine.gpus} with {machine.memory:g} GiB each)")
    for term in dict.fromkeys(term for plan in plans for term in plan.terms):
        memory.add_row(term, *(_gib(plan.terms.get(term)) for plan in plans))
    memory.add_section()
    memory.add_row("peak", *(f"{plan.total / GIB:.1f}" for plan in plans), style="bold")
    verdicts = ("fits" if plan.fits else "DOES NOT FIT" for plan in plans)
    memory.add_row("", *verdicts, style="bold")
    if any(plan.eager for plan in plans):
        memory.add_row(
            "for comparison: eager attention would keep",
            *("" if plan.eager is None else f"{sum(plan.eager) / GIB:.1f}" for plan in plans),
            style="dim",
        )
    console.print(memory)
    for plan in plans:
        console.print(f"{plan.name.upper()}: the peak is in {PHASES[plan.moment]}.")

    run = table("Run")
    for title, name in (("micro-batch", "batch"), ("accumulation", "accumulation")):
        run.add_row(title, *(str(getattr(plan.setup, name)) if plan.fits else "-" for plan in plans))
    run.add_row("global batch", *(str(plan.global_batch) for plan in plans))
    run.add_row("trained weights, M", *(f"{plan.trained / 1e6:,.1f}" for plan in plans))
    run.add_row("steps", *(f"{plan.steps:,}" for plan in plans))
    run.add_row("TFLOP a sample", *(f"{plan.executed / 1e12:.1f}" for plan in plans))
    run.add_row("seconds a step", *(f"{plan.seconds / plan.steps:.1f}" for plan in plans))
    run.add_row("hours", *(f"{plan.seconds / HOUR:.1f}" for plan in plans))
    run.add_row("GPU hours", *(f"{plan.seconds / HOUR * machine.gpus:.0f}" for plan in plans), style="bold")
    console.print(run)
    for plan in plans:
        if not plan.changes:
            continue
        advice = Table(
            title=f"{plan.name.upper()}: what to change, cheapest first, each with those above it", box=box.SIMPLE
        )
        for column in ("change", "settings", "GiB with one sample", ""):
            advice.add_column(column, overflow="fold")
        for change in plan.changes:
            advice.add_row(change.what, change.settings, f"{change.peak:.1f}", "fits" if change.fits else "")
        console.print(advice)
    # Outside rich, which would break the lines of what is to be copied.
    for plan, line in zip(plans, lines, strict=True):
        if plan.fits:
            print(line)
    print()
    print("Assumed, not measured:" if not machine.measured else "Assumed:")
    for sentence in assumptions(request, plans):
        print(f"* {sentence}")


def _gib(size: float | None) -> str:
    return "" if not size else f"{size / GIB:.2f}"
