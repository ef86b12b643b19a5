"""Summaries of an evaluation: read back, and as a table beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import DataError
from .benchmarks import get, registered
from .benchmarks.base import PAPER_MODELS

#: The paper's averages, in the table's order.
AVERAGES = ("VQA average", "CR average")
#: `PAPER_MODELS` in a table's head.
SHORT = ("teacher", "SFT", "CompoD.")


def show(summaries: Sequence[dict[str, Any]], name: str, console: Console) -> None:
    """The table, and below it what the summaries have to note."""
    console.print(table(summaries, name))
    for summary in summaries:
        if summary.get("note"):
            console.print(f"{get(summary['benchmark']).title}: {summary['note']}", markup=False, soft_wrap=True)


def table(summaries: Sequence[dict[str, Any]], name: str) -> Table:
    """The model's figures beside the paper's; its two averages where all that they are made of is there."""
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    result = Table(title=f"{name}: scores in %, beside the paper's at full size (arXiv 2510.12184)", **plain)
    for column in ("benchmark", "figure", "protocol"):
        result.add_column(column, no_wrap=True)
    for column in ("here", *(f"paper:\n{model}" for model in SHORT)):
        result.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        name = summary["benchmark"]
        title = get(name).title
        paper = [f"{value:.1f}" for value in summary["paper"].values()]
        figure = summary["headline"] + (" of a part" if "missing" in summary["figures"] else "")
        result.add_row(title, figure, summary["protocol"], percent(summary["value"]), *paper)
    whole = [summary for summary in summaries if summary["value"] is not None and "missing" not in summary["figures"]]
    found = {summary["benchmark"]: summary for summary in whole}
    for title in AVERAGES:
        names = [name for name, benchmark in registered().items() if benchmark.average == title]
        if not set(names) <= set(found):
            continue  # an average of fewer would not be the paper's
        papers = [mean(found[name]["paper"][model] for name in names) for model in PAPER_MODELS]
        result.add_section()
        here = percent(mean(found[name]["value"] for name in names))
        used = {found[name]["protocol"] for name in names}
        result.add_row(
            title, "", used.pop() if len(used) == 1 else "mixed", here, *(f"{value:.1f}" for value in papers)
        )
    return result


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def read_summary(path: Path) -> dict[str, Any]:
    """A summary that `eval` wrote.

    Raises:
        DataError: for a file that is none.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["benchmark"], summary["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no summary of `llava-compodistill eval` ({error}).") from None
    return summary
