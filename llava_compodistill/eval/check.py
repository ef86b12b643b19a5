"""`llava-compodistill eval --check`: which benchmarks' files are there, without a model."""

from __future__ import annotations

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
        scored: "here", or where else the answers are scored.
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
        return "by the challenge's server"
    pattern = benchmark.labels.replace("TASK", "*")
    if not pattern or any(data.glob(pattern)):
        return "here"
    return f"by the official scorer, or here with {data / benchmark.labels}"


def show(found: Sequence[Found], data: Path, console: Console) -> None:
    """A table of what is there, and below it what is not."""
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    table = Table(title=f"benchmarks below {data}", **plain)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("files", no_wrap=True)
    for column in ("items", "images"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("read", overflow="fold")
    table.add_column("scored", overflow="fold")
    for entry in found:
        counts = [f"{entry.items:,}", f"{entry.images:,}"] if entry.items else ["", ""]
        table.add_row(entry.benchmark.title, entry.state, *counts, _short(entry.read), entry.scored)
    console.print(table)
    for entry in found:
        if entry.problem:
            console.print(f"{entry.benchmark.title}, {entry.state}: {entry.problem}", markup=False, soft_wrap=True)


def _short(read: Sequence[str]) -> str:
    more = len(read) - 2
    return ", ".join(read[:2]) + (f" and {more} more" if more > 0 else "")
