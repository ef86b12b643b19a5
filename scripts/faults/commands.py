"""Kills, power cuts and full disks during `llava-compodistill eval` and `init --patch`: after the same command once
more, all files are those of a run that nothing has disturbed."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import Case, Outcome, Suite
from forks import import_all, in_child, modules
from shim import PLACES, Shim, lose_unsynced, read_trace
from training import ERRORS, Attempt, attempt_of, draw, last_words
from world import World

BENCHMARKS = "winoground,sugarcrepe,rbench"
FAULTS = ("kill", "cut", "disk")


def call(arguments: list[str], out: Path, log: Path, arm: Callable[[Shim], Any] | None = None) -> Attempt:
    """The command in a child, with a trace of what it does below a folder in LOG.trace."""

    def run() -> dict[str, Any]:
        from llava_compodistill.cli import main

        shim, trace = Shim(), log.with_suffix(".trace")
        trace.unlink(missing_ok=True)
        shim.watch(out, trace)
        if arm is not None:
            arm(shim)
        status = main(arguments)
        return {"status": status, "failed": shim.off(), "modules": modules()}

    ended = in_child(run, log)
    if arm is None and ended.value is not None:
        import_all(ended.value["modules"])
    return attempt_of(ended)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def disturb(case: Case, arguments: list[str], out: Path, folder: Path, trace: Path) -> tuple[str, Attempt, str]:
    """(what was injected, how the command ended, what was lost already) of a command that a fault meets."""
    rng = random.Random(case.name)
    operation, words = draw(read_trace(trace), rng)
    log = folder / "fault.log"
    if case.kind in ("kill", "cut"):
        place = rng.choice(PLACES)
        done = call(arguments, out, log, lambda shim: shim.kill_at(operation, place))
        words = f"kill {place} {words}"
        if case.kind == "cut" and done.status < 0:
            words += f", power cut ({len(lose_unsynced(read_trace(log.with_suffix('.trace')), out))} files lost bytes)"
        return words, done, "hang" if done.late else ""
    name = rng.choices(list(ERRORS), ERRORS.values())[0]
    room = rng.choice((0, 0, rng.randrange(2_000)))
    done = call(arguments, out, log, lambda shim: shim.fail_from(operation, room, getattr(errno, name)))
    words = f"{name} from {words} and {room:,} bytes on"
    if done.late:
        return words, done, "hang"
    raised = done.failed < 0  # the command has not come back with a status
    return words, done, "unclear error" if raised or done.status not in (0, 1, 2) else ""


def again(
    case: Case, arguments: list[str], out: Path, folder: Path, expected: dict[str, bytes], injected: str, lost: str
) -> Outcome:
    """The same command without a fault; its files against the expected ones."""
    done = call(arguments, out, folder / "again.log")
    if done.status:
        return Outcome(case, "hang" if done.late else "refused", injected, last_words(done.text))
    found = files(out)
    apart = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    leftovers = [name for name in apart if name not in expected]
    if len(leftovers) < len(apart):
        return Outcome(case, "unequal", injected, ", ".join(apart))
    if leftovers:
        return Outcome(case, "left behind", injected, ", ".join(leftovers))
    return Outcome(case, lost or "equal", injected)


# ---------------------------------------------------------------------------------------------------------------------
# eval
# ---------------------------------------------------------------------------------------------------------------------
def asked(world: World, out: Path) -> list[str]:
    return [
        "eval", "--model-path", str(world.teacher), "--data-root", str(world.root / "eval"), "--output", str(out),
        "--benchmarks", BENCHMARKS, "--device", "cpu", "--conv-mode", "qwen_qa", "--image-workers", "0",
    ]  # fmt: skip


def prepare_eval(world: World, kinds: Collection[str] = FAULTS) -> None:
    out = world.root / "asked"
    if not out.exists():
        done = call(asked(world, out), out, world.root / "asked.log")
        if done.status:
            raise RuntimeError(f"The undisturbed evaluation failed:\n{done.text}")


def evaluate(world: World, case: Case, folder: Path) -> Outcome:
    out = folder / "out"
    injected, done, lost = disturb(case, asked(world, out), out, folder, world.root / "asked.trace")
    found = again(case, asked(world, out), out, folder, files(world.root / "asked"), injected, lost)
    if lost and not found.detail:
        found.detail = last_words(done.text)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# init --patch
# ---------------------------------------------------------------------------------------------------------------------
def prepare_init(world: World, kinds: Collection[str] = FAULTS) -> None:
    fresh, patched = world.root / "checkout", world.root / "patched"
    if patched.exists():
        return
    spec = find_spec("llava")
    assert spec is not None and spec.origin is not None
    ignored = shutil.ignore_patterns("__pycache__", "serve")
    shutil.copytree(Path(spec.origin).parent, fresh / "llava", ignore=ignored)
    shutil.copytree(fresh, patched)
    done = call(["init", str(patched), "--patch"], patched, world.root / "patched.log")
    if done.status:
        raise RuntimeError(f"init --patch failed:\n{done.text}")


def patch(world: World, case: Case, folder: Path) -> Outcome:
    """Beside that: right after the fault every file of LLaVA's is the old or the new one."""
    out = folder / "out"
    shutil.copytree(world.root / "checkout", out)
    arguments = ["init", str(out), "--patch"]
    injected, done, lost = disturb(case, arguments, out, folder, world.root / "patched.trace")
    old, new, now = files(world.root / "checkout"), files(world.root / "patched"), files(out)
    torn = [name for name in old if now.get(name) not in (old[name], new[name])]
    if torn and case.kind != "cut":
        return Outcome(case, "torn", injected, ", ".join(torn))
    found = again(case, arguments, out, folder, new, injected, lost)
    if lost and not found.detail:
        found.detail = last_words(done.text)
    return found


SUITES = {
    "eval": Suite(FAULTS, prepare_eval, evaluate),
    "init": Suite(FAULTS, prepare_init, patch),
}
