"""Several processes, one a GPU, answer a benchmark's questions; each keeps its own records, which are joined after.

A share is every n-th of the items that are left. A kill loses nothing: the shares that lie there are joined before
the work is divided again, over as many processes as there are then.

accelerate does not replace this: its `split_between_processes` divides a list among the ranks of one process group,
which start and end together. Shares know nothing of each other, write files of their own, and their number may differ
from one start to the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError, RecordsError
from .records import RecordFile


def devices(device: str | None, processes: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process: one a GPU, or as many as are asked for; None where there is no GPU.

    Args:
        device: --device; None and "cuda" take every GPU, "cuda:1" that one, "cpu" none.
        processes: --processes.

    Raises:
        DataError: for a GPU that is not there.
    """
    import torch

    number = int(device.split(":")[1]) if device and ":" in device else 0
    if device not in (None, "cpu") and number >= torch.cuda.device_count():
        raise DataError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here.")
    cards: list[str | None] = []
    if device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = list(visible.split(",")) if visible else [str(n) for n in range(torch.cuda.device_count())]
        cards = cards[: torch.cuda.device_count()]
        cards = cards[number:][:1] if device and ":" in device else cards
    cards = cards or [None]
    return [cards[number % len(cards)] for number in range(processes or len(cards))]


def dtype_for(devices: Sequence[str | None], asked_for: str | None) -> str:
    """--dtype, or bfloat16 on GPUs and float32 elsewhere."""
    return asked_for or ("float32" if devices[0] is None else "bfloat16")


def share_path(path: Path, number: int, count: int) -> Path:
    """Where share `number` of `count` keeps its records: NAME.share-0-of-2.jsonl beside NAME.jsonl."""
    return path.with_name(f"{path.stem}.share-{number}-of-{count}{path.suffix}")


def join(path: Path, run: dict, ids: Sequence[str], overwrite: bool = False) -> set[str]:
    """Move the records of all shares into the whole file, in the order of the items; returns the ids it has then.

    Raises:
        RecordsError: for records of another run.
    """
    shares = sorted(path.parent.glob(f"{path.stem}.share-*{path.suffix}"))
    if overwrite:
        for share in shares:
            _remove(share)
        shares = []
    with RecordFile(path, run, ids, overwrite) as whole:
        found = {}
        for share in shares:
            with RecordFile(share, run, ids) as records:
                found |= records.done
        whole.append(found[key] for key in ids if key in found and key not in whole.done)
        done = set(whole.done)
    for share in shares:
        _remove(share)
    return done


def run_processes(
    commands: Sequence[Sequence[str]],
    devices: Sequence[str | None],
    count_done: Callable[[], int],
    progress: Callable[[int], None],
) -> None:
    """Run Python commands at once, each with its device in CUDA_VISIBLE_DEVICES, until all have ended.

    Raises:
        RecordsError: when one fails; the others are stopped, and what they answered stays.
    """
    shown = 0
    with stopped_together() as processes:
        for command, device in zip(commands, devices, strict=True):
            environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
            line = [sys.executable, *command]
            processes.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL))
        while True:
            states = [process.poll() for process in processes]
            done = count_done()
            progress(done - shown)
            shown = done
            failed = [number for number, state in enumerate(states) if state not in (None, 0)]
            if failed:
                raise RecordsError(f"Process {failed[0]} of {len(commands)} failed; what was answered is kept.")
            if all(state == 0 for state in states):
                return
            time.sleep(0.2)


@contextlib.contextmanager
def stopped_together() -> Iterator[list[subprocess.Popen]]:
    """A list for processes; those that still run when this is left are stopped. A SIGTERM leaves it too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if main else None
    processes: list[subprocess.Popen] = []
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if main:
            signal.signal(signal.SIGTERM, before)


def lines_in(paths: Sequence[Path]) -> int:
    """Whole lines in files that may not be there yet."""
    return sum(path.read_bytes().count(b"\n") for path in paths if path.is_file())


def _remove(share: Path) -> None:
    share.unlink(missing_ok=True)
    share.with_name(share.name + ".run.json").unlink(missing_ok=True)
