"""Summaries of an evaluation: read back, and as a table beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import DataError
from ..hosts.files import read_object
from .benchmarks import get, registered
from .benchmarks.base import PAPER_MODELS

#: The paper's averages, in the table's order.
AVERAGES = ("VQA average", "CR average")
#: `PAPER_MODELS` in a table's head.
SHORT = ("teacher", "SFT", "CompoD.")


#: How sure it is that the paper's figure is of the kind of ours (`Benchmark.paper_kind`), in the table.
MARKS = {"published": "", "inferred": "*", "unknown": "?"}
LEGEND = {
    "inferred": "* the paper does not say how this is computed; only this computation fits its figures",
    "unknown": "? the paper does not say how this is computed; the figures may not be comparable",
}


def show(summaries: Sequence[dict[str, Any]], name: str, console: Console) -> None:
    """The table, and below it what the summaries have to note."""
    console.print(table(summaries, name))
    kinds = {get(summary["benchmark"]).paper_kind for summary in summaries if summary["paper"]}
    for kind, text in LEGEND.items():
        if kind in kinds:
            console.print(text, markup=False, soft_wrap=True)
    for summary in summaries:
        if summary.get("judge"):
            text = f"rscore is by the judge {summary['judge']['judge']}, which is not the authors'."
            console.print(f"{get(summary['benchmark']).title}: {text}", markup=False, soft_wrap=True)
        if summary.get("note"):
            console.print(f"{get(summary['benchmark']).title}: {summary['note']}", markup=False, soft_wrap=True)


def table(summaries: Sequence[dict[str, Any]], name: str) -> Table:
    """The model's figures beside the paper's; its two averages where all that they are made of is there.

    Beside the paper's figure stands ours by the rule of the benchmark's authors, which the paper's evaluator follows
    ("official"); where that differs from the default, stricter one, both are there.
    """
    # Its columns just fit a terminal of 80.
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": 0, "title_justify": "left"}
    result = Table(title=f"{name}: scores in %; the paper: full size (arXiv 2510.12184)", **plain)
    for column in ("benchmark", "figure", "protocol"):
        result.add_column(column, no_wrap=True)
    for column in ("strict", "here", *(f"paper:\n{model}" for model in SHORT)):
        result.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        benchmark = get(summary["benchmark"])
        mark = MARKS[benchmark.paper_kind]
        whole = "missing" not in summary["figures"]
        paper = [f"{value:.1f}{mark}" for value in summary["paper"].values()] if whole else []
        figure = summary["headline"] + ("" if whole else " (part)")
        strict = summary.get("readings", {}).get("strict")
        strict = "" if strict is None else percent(strict.get("value", summary["value"]))
        result.add_row(benchmark.title, figure, summary["protocol"], strict, percent(official(summary)), *paper)
        for name in benchmark.beside:
            if summary["figures"].get(name) is not None:
                result.add_row("", name, summary["protocol"], percent(summary["figures"][name]), "")
    whole = [summary for summary in summaries if summary["value"] is not None and "missing" not in summary["figures"]]
    found = {summary["benchmark"]: summary for summary in whole if summary["paper"]}
    for title in AVERAGES:
        names = [name for name, benchmark in registered().items() if benchmark.average == title]
        if not set(names) <= set(found):
            continue  # an average of fewer, or of figures of another kind, would not be the paper's
        papers = [mean(found[name]["paper"][model] for name in names) for model in PAPER_MODELS]
        mark = "?" if any(get(name).paper_kind == "unknown" for name in names) else ""
        result.add_section()
        here = percent(mean(official(found[name]) or 0.0 for name in names))
        used = {found[name]["protocol"] for name in names}
        protocol = used.pop() if len(used) == 1 else "mixed"
        result.add_row(title, "", protocol, "", here, *(f"{value:.1f}{mark}" for value in papers))
    return result


def official(summary: dict[str, Any]) -> float | None:
    """The headline by the rule of the benchmark's authors."""
    return summary.get("readings", {}).get("official", {}).get("value", summary["value"])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


#: What `compare` and the tables take from a summary.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("benchmark", "headline", "protocol", "model", "fingerprint"), str),
    "figures": dict,
    "items": int,
    "value": (int, float, type(None)),
}


def read_summary(path: Path) -> dict[str, Any]:
    """A summary that `eval` wrote.

    Raises:
        DataError: for a file that is none.
    """
    summary = read_object(path)
    for name, kinds in _FIELDS.items():
        if name not in summary:
            raise DataError(f"{path}: no summary of `llava-compodistill eval`, it has no {name!r}.")
        if not isinstance(summary[name], kinds) or isinstance(summary[name], bool):
            raise DataError(f"{path}: no summary of `llava-compodistill eval`, its {name!r} is {summary[name]!r:.60}.")
    if not isinstance(summary.get("pins", {}), dict | None):
        raise DataError(f"{path}: no summary of `llava-compodistill eval`, its 'pins' are {summary['pins']!r:.60}.")
    try:
        get(summary["benchmark"])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return summary
