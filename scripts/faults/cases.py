"""One case of a suite, what became of it, and the table of all."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
#: Outcomes that are as they should be; all others are losses.
HELD = ("equal", "refused clearly", "ok", "clear error")
_PACKAGES = ("torch", "transformers", "safetensors", "peft", "accelerate", "pillow", "numpy", "llava_compodistill")


@dataclass(frozen=True)
class Case:
    """What is done to whom. Everything that is random about it comes from the suite, its kind and its seed.

    Attributes:
        suite: one of run.py's.
        kind: of run, or what is read.
        seed: of this case.
    """

    suite: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """As --case takes it."""
        return f"{self.suite}:{self.kind}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Case:
        suite, _, rest = text.partition(":")
        kind, _, seed = rest.rpartition(":")
        if not (suite and kind and seed.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not SUITE:KIND:SEED.")
        return cls(suite, kind, int(seed))


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        outcome: one of `HELD`, or what was lost.
        injected: the fault, in words: the operation and its number, or the mutation.
        detail: the last of what was said, or where something differs.
        notes: what is worth knowing and no loss.
    """

    case: Case
    outcome: str
    injected: str = ""
    detail: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return self.outcome in HELD


@dataclass(frozen=True)
class Suite:
    """A kind of faults.

    Attributes:
        kinds: its kinds of cases.
        prepare: runs once, in the process that all others are forked from, and makes what cases of some kinds need:
            undisturbed runs, files to damage.
        perform: one case in a process of its own, in an empty folder.
        batch: how many cases share such a process.
        timeout: seconds for each case.
    """

    kinds: Sequence[str]
    prepare: Callable[[Any, Collection[str]], None]
    perform: Callable[[Any, Case, Path], Outcome]
    batch: int = 1
    timeout: float = 180.0


def table(outcomes: Sequence[Outcome]) -> Table:
    """Injected, survived and lost, by suite and kind."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left")
    for name in ("suite", "kind"):
        result.add_column(name, no_wrap=True)
    for name in ("injected", "survived", "lost"):
        result.add_column(name, justify="right")
    result.add_column("how", overflow="fold")
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.case.suite, one.case.kind), []).append(one)
    for (suite, kind), some in groups.items():
        result.add_row(suite, kind, *_counts(some))
    if len(groups) > 1:
        result.add_section()
        result.add_row("all", "", *_counts(outcomes))
    return result


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    lost = [one for one in outcomes if not one.held]
    kinds = Counter(one.outcome for one in outcomes)
    how = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return [f"{len(outcomes):,}", f"{len(outcomes) - len(lost):,}", f"[red]{len(lost):,}[/]" if lost else "0", how]


def write_report(path: Path, outcomes: Sequence[Outcome], command: str, seconds: float, brief: bool = False) -> None:
    """All cases as JSON, with what they ran on, and how many there are of each kind and outcome.

    Args:
        brief: of the cases, those that were lost alone.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    for one in outcomes:
        counts.setdefault(one.case.suite, {}).setdefault(one.case.kind, Counter())[one.outcome] += 1
    content = {
        "command": command,
        "seconds": round(seconds),
        **environment(),
        "injected": len(outcomes),
        "lost": sum(not one.held for one in outcomes),
        "counts": counts,
        "cases": [{**asdict(one), "case": one.case.name} for one in outcomes if not (brief and one.held)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def environment() -> dict[str, Any]:
    """Commit, versions and machine."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"commit": done.stdout.strip(), "versions": versions, "machine": f"{sys.platform} {platform.machine()}"}
