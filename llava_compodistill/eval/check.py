"""`llava-compodistill eval --check`: which benchmarks' files are there, without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import MissingData
from .benchmarks import files
from .benchmarks.base import Benchmark, EngineBenchmark
from .benchmarks.llava import LlavaBenchmark, read_questions


@dataclass(frozen=True)
class Found:
    """What there is of a benchmark.

    Attributes:
        state: complete, missing (nobody has got it), or wrong.
        items: questions or items, where it is complete.
        images: different images.
        read: the files that were read, below the data root.
        scored: where answers are scored: "here", by the "server" of a challenge, or by the "official" scorer alone.
        problem: what is missing or wrong, and the way out.
    """

    benchmark: Benchmark
    state: str
    items: int = 0
    images: int = 0
    read: tuple[str, ...] = ()
    scored: str = ""
    problem: str = ""


def look(
    benchmark: Benchmark, data: Path, prepare: Callable[[EngineBenchmark], None] = lambda benchmark: None
) -> Found:
    """Read a benchmark's files as an evaluation would.

    Args:
        prepare: unpacks what its authors' download holds.
    """
    try:
        with files.noted() as read:
            if isinstance(benchmark, LlavaBenchmark):
                benchmark.check(data)
                questions = read_questions(data / benchmark.questions)
                items, images = len(questions), len({str(entry["image"]) for entry in questions})
                scored = _scored(benchmark, data)
            else:
                assert isinstance(benchmark, EngineBenchmark)
                prepare(benchmark)
                loaded = benchmark.load(data)
                items, images = len(loaded), len({str(image) for item in loaded for image in item.images})
                scored = "here"
    except MissingData as error:
        return Found(benchmark, "missing", problem=str(error))
    except ValueError as error:  # DataError, RecordsError
        return Found(benchmark, "wrong", problem=str(error))
    return Found(benchmark, "complete", items, images, tuple(files.named_below(data, read)), scored)


def _scored(benchmark: LlavaBenchmark, data: Path) -> str:
    if benchmark.score is None:
        return "server"
    if not benchmark.labels:
        return "here"
    # In their folder, or in one within it, as some of MME's tasks and a newer download of GQA have them.
    path = Path(benchmark.labels.replace("TASK", "*"))
    there = any(found for name in (path, path.parent / "*" / path.name) for found in data.glob(str(name)))
    return "here" if there else "official"


def show(found: Sequence[Found], data: Path, console: Console) -> None:
    """A table of what is there, and below it what is not."""
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    table = Table(title=f"benchmarks below {data}", **plain)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("files", no_wrap=True)
    for column in ("items", "images"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("scored", no_wrap=True)
    table.add_column("in", overflow="fold")
    for entry in found:
        counts = [f"{entry.items:,}", f"{entry.images:,}"] if entry.items else ["", ""]
        place = os.path.commonpath([os.path.dirname(name) for name in entry.read]) if entry.read else ""
        table.add_row(entry.benchmark.title, entry.state, *counts, entry.scored, place)
    console.print(table)
    if any(entry.scored == "server" for entry in found):
        console.print("server: an evaluation ends with a file for the challenge's server.")
    for entry in found:
        if entry.scored == "official" and isinstance(entry.benchmark, LlavaBenchmark):
            where = data / entry.benchmark.labels
            text = f"official: {entry.benchmark.title} needs its official scorer, or its labels at {where}."
            console.print(text, markup=False, soft_wrap=True)
    for entry in found:
        if entry.problem:
            console.print(f"{entry.benchmark.title}, {entry.state}: {entry.problem}", markup=False, soft_wrap=True)
