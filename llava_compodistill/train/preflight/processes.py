"""Work on many samples, in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...errors import DataError

Chunk = Sequence[Any]
#: What the processes share: they are forked, so that a data set need not be sent to them.
_shared: dict[str, Any] = {}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(console: Console) -> Progress:
    """Shown on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def in_processes(
    work: Callable[[Any, Chunk], list],
    shared: Any,
    chunks: Iterable[Chunk],
    workers: int,
    done: Callable[[int], None],
    flag: str = "--workers",
) -> Iterator[Any]:
    """`work(shared, chunk)` for each chunk, their results one by one and in order.

    Args:
        done: told how many entries have been worked on since the last time.
        flag: sets the number of processes.

    Raises:
        DataError: when a process is killed.
    """
    if workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        for chunk in chunks:
            yield from work(shared, chunk)
            done(len(chunk))
        return
    _shared["work"], _shared["shared"] = work, shared
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=_begin) as pool:
            for result in pool.map(_work, chunks):
                yield from result
                done(len(result))
    except BrokenProcessPool:
        raise DataError(
            "A process that reads samples was killed, possibly because one needs more memory than is available. Lower "
            f"{flag} ({flag} 1 reads everything in one process)."
        ) from None
    finally:
        _shared.clear()


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(chunk: Chunk) -> list:
    return _shared["work"](_shared["shared"], chunk)
