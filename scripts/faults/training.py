"""Faults during `llava-compodistill train`: kills and power cuts, full disks, damaged checkpoints, two at once.

A run is whole when its weights, its optimizer's state and its log are those of the run that nothing has disturbed, to
the last bit.
"""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damages
from cases import Case, Outcome, Suite
from forks import Child, Ended, import_all, in_child, modules
from shim import PLACES, Operation, Shim, lose_unsynced, read_trace
from world import RUNS, STEPS, World, result, train

#: What a disk may answer, and how often it is drawn.
ERRORS = {"ENOSPC": 7, "EDQUOT": 1, "EIO": 1, "EROFS": 1}
_AGAIN = 3


@dataclass(frozen=True)
class Attempt:
    """A run that has ended.

    Attributes:
        status: 0, 2 for an error that explains itself, negative for a signal, 1 for anything else.
        failed: operations that the shim let fail.
        text: the end of its output.
    """

    status: int
    failed: int
    text: str
    late: bool


def attempt(shim: Shim | None, flags: list[str], out: Path, log: Path, arm: Callable[[Shim], None] | None) -> Attempt:
    """A run in a child, with a trace in LOG.trace where there is a shim."""
    return attempt_of(in_child(lambda: _run(shim, flags, out, log.with_suffix(".trace"), arm), log))


def _run(shim: Shim | None, flags: list[str], out: Path, trace: Path, arm: Callable[[Shim], None] | None) -> Any:
    if shim is not None:
        trace.unlink(missing_ok=True)
        shim.watch(out, trace)
        if arm is not None:
            arm(shim)
    status = train(flags)
    return {"status": status, "failed": shim.off() if shim is not None else 0, "modules": modules()}


def attempt_of(ended: Ended) -> Attempt:
    value = ended.value or {"status": ended.status or 1, "failed": -1}
    return Attempt(value["status"], value["failed"], ended.text, ended.late)


def last_words(text: str) -> str:
    """The end of an output that tells most: the error, or the last lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-2:])[-500:]


# ---------------------------------------------------------------------------------------------------------------------
# Undisturbed runs
# ---------------------------------------------------------------------------------------------------------------------
def _and_before(kinds: Collection[str]) -> list[str]:
    """The kinds of runs, and those whose outputs they begin from."""
    needed = {*kinds, "dpt"} | ({"dft"} if "sft" in kinds else set())
    return [kind for kind in RUNS if kind in needed]


def prepare(world: World, kinds: Collection[str]) -> None:
    """Run some kinds once: what the others are compared with, and the operations that there are."""
    for kind in _and_before(kinds):
        if (world.root / f"{kind}.json").exists():
            continue
        shim = Shim()
        log = world.root / f"{kind}.log"
        ended = in_child(lambda kind=kind, shim=shim, log=log: _reference(world, kind, shim, log), log, 600)
        if ended.value is None:
            raise RuntimeError(f"The undisturbed run {kind} failed:\n{ended.text}")
        import_all(ended.value)


def _reference(world: World, kind: str, shim: Shim, log: Path) -> list[str]:
    out = world.root / kind
    done = _run(shim, world.flags(kind, out), out, log.with_suffix(".trace"), None)
    if done["status"]:
        raise RuntimeError(f"exit status {done['status']}")
    (world.root / f"{kind}.json").write_text(json.dumps(result(out)))
    return done["modules"]


def finish(world: World, case: Case, out: Path, folder: Path, injected: str, notes: list[str]) -> Outcome:
    """Run until whole; compare."""
    shim = Shim()
    done = attempt(shim, world.flags(case.kind, out), out, folder / "restart.log", None)
    if done.late:
        return Outcome(case, "hang", injected, last_words(done.text), notes)
    if done.status:
        return Outcome(case, "refused", injected, last_words(done.text), notes)
    return compare(world, case, out, injected, notes)


def compare(world: World, case: Case, out: Path, injected: str, notes: list[str]) -> Outcome:
    expected = json.loads((world.root / f"{case.kind}.json").read_text())
    try:
        found = json.loads(json.dumps(result(out)))
    except Exception as error:
        return Outcome(case, "torn", injected, f"{type(error).__name__}: {error}", notes)
    notes += [f"left behind: {path.relative_to(out)}" for path in out.rglob("*") if _is_leftover(path.name)]
    apart = [name for name in expected if found.get(name) != expected[name]]
    return Outcome(case, "unequal" if apart else "equal", injected, ", ".join(apart), notes)


def _is_leftover(name: str) -> bool:
    return name.startswith((".tmp", "tmp-")) or name.endswith((".part", ".tmp"))


def operations(world: World, kind: str) -> list[Operation]:
    return read_trace(world.root / f"{kind}.trace")


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------
def draw(trace: list[Operation], rng: random.Random) -> tuple[int, str]:
    """(number of an operation from 1, in words): every kind of operation is as likely, whatever there are of it."""
    kind = rng.choice(sorted({one.kind for one in trace}))
    number = rng.choice([n for n, one in enumerate(trace, 1) if one.kind == kind])
    return number, f"{kind} {number} of {len(trace)}, {Path(trace[number - 1].path).name}"


def kill(world: World, case: Case, folder: Path) -> Outcome:
    """SIGKILL at an operation, at times again at one of the restart's."""
    return _kill(world, case, folder, cut=False)


def cut_power(world: World, case: Case, folder: Path) -> Outcome:
    """The same, and after the first one all that was not synced is lost."""
    return _kill(world, case, folder, cut=True)


def _kill(world: World, case: Case, folder: Path, cut: bool) -> Outcome:
    rng, shim, out = random.Random(case.name), Shim(), folder / "out"
    trace, said, steps_lost, furthest = operations(world, case.kind), [], 0, 0
    for number in range(2 if rng.random() < 0.25 else 1):
        operation, words = draw(trace, rng)
        place = rng.choice(PLACES)
        log = folder / f"kill-{number}.log"
        killed = attempt(shim, world.flags(case.kind, out), out, log, lambda s: s.kill_at(operation, place))  # noqa: B023
        done = read_trace(log.with_suffix(".trace"))
        said.append(f"kill {place} {words}")
        if killed.late:
            return Outcome(case, "hang", "; ".join(said), last_words(killed.text))
        steps_lost += _lost(furthest, done)
        if killed.status >= 0:
            if killed.status:
                return Outcome(case, "refused", "; ".join(said), last_words(killed.text))
            break  # a restart has less to do
        furthest = max([furthest, *_steps(done)])
        if cut and not number:
            said[-1] += f", power cut ({len(lose_unsynced(done, out))} files lost bytes)"
    found = finish(world, case, out, folder, "; ".join(said), [])
    if found.outcome == "equal":
        steps_lost += _lost(furthest, read_trace(folder / "restart.trace"))
        if steps_lost:
            found.outcome, found.detail = "steps lost", f"{steps_lost} more than the one between two checkpoints"
    return found


def _steps(trace: list[Operation]) -> list[int]:
    """The checkpoints that a run has begun to write."""
    found = (re.search(r"checkpoint-(\d+)", one.path) for one in trace if one.kind in ("mkdir", "open"))
    return [int(match[1]) for match in found if match]


def _lost(furthest: int, restarted: list[Operation]) -> int:
    """How many steps were made again whose checkpoint was whole: all before the one that was being written."""
    first = min(_steps(restarted), default=furthest)
    return max(0, furthest - first)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------
def fill(world: World, case: Case, folder: Path) -> Outcome:
    """A disk that is full (over its quota, broken, read-only) from an operation on; then it is mended."""
    rng, shim, out = random.Random(case.name), Shim(), folder / "out"
    operation, words = draw(operations(world, case.kind), rng)
    name = rng.choices(list(ERRORS), ERRORS.values())[0]
    room = rng.choice((0, 0, rng.randrange(5_000), rng.randrange(2_000_000)))
    code = getattr(errno, name)
    flags = world.flags(case.kind, out)
    injected = f"{name} from {words} and {room:,} bytes on"
    full = attempt(shim, flags, out, folder / "full.log", lambda s: s.fail_from(operation, room, code))
    if full.status == 0:
        # Nothing needed the room any more, or somebody has done without.
        return compare(world, case, out, injected, [f"{full.failed} operations failed, and the run ended well"])
    if full.status < 0 or full.late:
        return Outcome(case, "hang" if full.late else "died", injected, last_words(full.text))
    found = finish(world, case, out, folder, injected, [])
    if found.outcome == "equal" and full.status != 2:
        found.outcome, found.detail = "unclear error", last_words(full.text)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def prepare_damage(world: World, kinds: Collection[str]) -> None:
    """Runs that were killed in their last step, with a checkpoint of each step before."""
    prepare(world, kinds)
    for kind in kinds:
        out = world.root / "stopped" / kind
        if out.exists():
            continue
        flags = world.flags(kind, out, save_total_limit=STEPS, verify_checkpoints=True)
        done = attempt(None, flags, out, world.root / f"stopped-{kind}.log", None)
        if done.status:
            raise RuntimeError(f"The undisturbed run {kind} failed:\n{done.text}")
        for path in out.iterdir():
            if path.is_file():
                path.unlink()
            elif not path.name.startswith("checkpoint-") or path.name == f"checkpoint-{STEPS}":
                shutil.rmtree(path)


def damage(world: World, case: Case, folder: Path) -> Outcome:
    """A file of the newest checkpoint is not what it was. A run that does not hash whole files
    (`--verify_checkpoints`) does not promise to see a bit that has changed in the middle of one."""
    from llava_compodistill.train.manifest import END, MANIFEST_FILE

    rng, out = random.Random(case.name), folder / "out"
    shutil.copytree(world.root / "stopped" / case.kind, out)
    newest = out / f"checkpoint-{STEPS - 1}"
    path = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    marker = folder / "payload-ran"
    verify = rng.random() < 0.5
    name = damages.apply(path, marker, rng, end=None if verify else END)
    injected = f"{name}: {path.relative_to(newest)}{', whole files are hashed' if verify else ''}"
    flags = world.flags(case.kind, out, save_total_limit=STEPS, verify_checkpoints=verify)
    done = attempt(None, flags, out, folder / "restart.log", None)
    if marker.exists():
        return Outcome(case, "code ran", injected, last_words(done.text))
    if done.status == 2:
        return Outcome(case, "refused clearly", injected, last_words(done.text))
    if done.status:
        return Outcome(case, "hang" if done.late else "raw error", injected, last_words(done.text))
    if name == "one bit" and path.name != MANIFEST_FILE and f"{newest.name} is incomplete" not in done.text:
        return Outcome(case, "not noticed", injected, last_words(done.text))
    return compare(world, case, out, injected, [])


# ---------------------------------------------------------------------------------------------------------------------
# Two at once
# ---------------------------------------------------------------------------------------------------------------------
def pair(world: World, case: Case, folder: Path) -> Outcome:
    """The same command twice in one output folder, the second begun at some time of the first."""
    rng, out = random.Random(case.name), folder / "out"
    flags, delay = world.flags(case.kind, out), rng.choice((0.0, rng.uniform(0, 3)))
    children = []
    for number in range(2):
        log = folder / f"{number}.log"
        children.append(Child(lambda log=log: _run(None, flags, out, log.with_suffix(".trace"), None), log, 120))
        time.sleep(0 if number else delay)
    done = [attempt_of(child.wait()) for child in children]
    injected = f"a second run after {delay:.2f} s"
    notes = [f"exit {one.status}" for one in done]
    raw = [one for one in done if one.status not in (0, 2)]
    if raw:
        return Outcome(case, "hang" if raw[0].late else "raw error", injected, last_words(raw[0].text), notes)
    if all(one.status for one in done):
        return Outcome(case, "both refused", injected, last_words(done[1].text), notes)
    return compare(world, case, out, injected, notes)


SUITES = {
    "kills": Suite(tuple(RUNS), prepare, kill),
    "cuts": Suite(tuple(RUNS), prepare, cut_power),
    "disks": Suite(tuple(RUNS), prepare, fill),
    "damage": Suite(tuple(RUNS), prepare_damage, damage),
    "pairs": Suite(tuple(RUNS), prepare, pair),
}
