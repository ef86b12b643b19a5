"""Children of a process that has imported everything: torch, transformers and LLaVA take longer than a tiny run."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL = 0.01


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; negative: the signal that ended it.
        value: what its function returned, through JSON; None where it did not.
        text: the end of what it printed.
        late: whether it was stopped because it took too long.
    """

    status: int
    value: Any
    text: str
    late: bool = False


class Child:
    """A function in a forked process, in a session of its own, its output in a file.

    Args:
        log: gets stdout and stderr; LOG.value what the function returns.
        timeout: seconds after which it and its children are killed.
    """

    def __init__(self, function: Callable[[], Any], log: Path, timeout: float):
        self._log, self._value, self._end = log, log.with_suffix(".value"), time.monotonic() + timeout
        self._value.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._live(function)

    def _live(self, function: Callable[[], Any]) -> None:
        status = 1
        try:
            os.setsid()
            file = os.open(self._log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            if "torch" in sys.modules:
                # A fork leaves PyTorch without its pool of threads. The first call makes it anew, which the threads
                # that load a model would else try all at once.
                sys.modules["torch"].set_num_threads(1)
            self._value.write_text(json.dumps(function()))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = not pid and time.monotonic() > self._end
        if late:
            self.stop()
            pid, status = os.waitpid(self.pid, 0)
        if not pid:
            return None
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        value = json.loads(self._value.read_text()) if self._value.exists() else None
        return Ended(os.waitstatus_to_exitcode(status), value, text[-6000:], late)

    def stop(self) -> None:
        """Kill it and its children; those that have a session of their own are not found."""
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait(self) -> Ended:
        while (ended := self.poll()) is None:
            time.sleep(_POLL)
        return ended


def in_child(function: Callable[[], Any], log: Path, timeout: float = 120.0) -> Ended:
    """Run a function in a child, and wait for it."""
    return Child(function, log, timeout).wait()


def each(
    jobs: Sequence[Callable[[], Any]], folder: Path, workers: int, timeout: float, until: float = float("inf")
) -> Iterator[tuple[int, Ended]]:
    """Run functions in children, some at a time; (number, how it ended) in the order in which they end.

    Args:
        until: of `time.monotonic()`; afterwards no further one is started.
    """
    waiting, running = list(enumerate(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            if time.monotonic() > until:
                waiting.clear()
                break
            number, job = waiting.pop(0)
            running[number] = Child(job, folder / f"job-{number}.log", timeout)
        for number, child in list(running.items()):
            ended = child.poll()
            if ended is not None:
                del running[number]
                yield number, ended
        time.sleep(_POLL)


def limit_memory(room: int) -> None:
    """Let this process map so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def modules() -> list[str]:
    """What this process has imported."""
    return sorted(sys.modules)


def import_all(names: Sequence[str]) -> None:
    """Import what a child has, so that the next ones need not."""
    for name in names:
        if name not in sys.modules and not name.startswith(("__", "llava.")):
            try:
                importlib.import_module(name)
            except Exception:  # a module that was made, or that somebody has replaced
                continue
