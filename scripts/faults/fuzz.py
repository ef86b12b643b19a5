"""Seeded hostile input through the real readers, and what they make of it.

ok              read, and everything holds that must
clear error     a CompoDistillError that names the file
unnamed error   one that does not
raw exception   anything else
nonsense        accepted, though it cannot be meant
hang, memory    longer than some seconds of CPU time, or more than a gigabyte
code ran        a payload has left its marker
"""

from __future__ import annotations

import gc
import logging
import random
import signal
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import checkpoints
import readers
from cases import Case, Outcome, Suite
from forks import limit_memory
from world import World

TARGETS = {
    "data": readers.data,
    "mix": readers.mix,
    "image": readers.image,
    "benchmark": readers.benchmark,
    "answers": readers.answers,
    "records": readers.records,
    "checkpoint": checkpoints.checkpoint,
    "resume": checkpoints.resume,
}
#: Seconds of CPU time; and on the clock, for what waits without computing.
CPU_SECONDS, SECONDS = 10, 60
MEMORY = 2**30
_limited: list[bool] = []


class Slow(BaseException):
    """A case has had its time; nobody catches this."""


def prepare(world: World, kinds: Collection[str]) -> None:
    import commands
    import training

    readers.prepare(world)
    if "records" in kinds:
        commands.prepare_eval(world)
    if "resume" in kinds:
        training.prepare_damage(world, list(checkpoints.KINDS.values()))
    if "checkpoint" in kinds:
        training.prepare(world, list(checkpoints.KINDS.values()))
        checkpoints.prepare(world)


def perform(world: World, case: Case, folder: Path) -> Outcome:
    """Make one case and read it; in a child, whose memory it limits."""
    logging.disable(logging.CRITICAL)
    if not _limited:
        _limited.append(True)
        limit_memory(4 * MEMORY)  # a pool of threads alone maps some of it
        gc.freeze()
    gc.collect()  # what an earlier case has left would count against this one's limit
    rng = random.Random(case.name)
    said, names, read = TARGETS[case.kind](world, folder, rng)
    before = _peak(reset=True)
    found = _read(case, said, names, read)
    if (folder / readers.MARKER).exists():
        return Outcome(case, "code ran", said, found.detail)
    if found.held and _peak() - before > MEMORY:
        return Outcome(case, "memory", said, f"{(_peak() - before) / 2**30:.1f} GiB")
    return found


def _read(case: Case, said: str, names: list[str], read: Any) -> Outcome:
    from llava_compodistill.errors import CompoDistillError

    def stop(*_: Any) -> None:
        raise Slow

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return Outcome(case, "ok", said)
    except CompoDistillError as error:
        named = any(name in str(error) for name in names)
        return Outcome(case, "clear error" if named else "unnamed error", said, "" if named else _short(error))
    except readers.Nonsense as error:
        return Outcome(case, "nonsense", said, str(error))
    except Slow:
        return Outcome(case, "hang", said, "")
    except MemoryError as error:
        return Outcome(case, "memory", said, _short(error))
    except BaseException as error:
        return Outcome(case, "raw exception", said, f"{_short(error)} ({_place(error)})")
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _place(error: BaseException) -> str:
    """The last line of this package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "llava_compodistill" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _peak(reset: bool = False) -> int:
    """The most memory that this process has held, in bytes, since it was reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


SUITES = {"fuzz": Suite(tuple(TARGETS), prepare, perform, batch=40, timeout=20.0)}
