"""What runs on which versions: python scripts/versions/run.py [--pythons 3.10,3.11] [--generations llava,current]

For each Python that this machine has and each generation of transformers (LLaVA's own and the current one, as
scripts/setup_env.sh pins them), with the oldest and the newest torch that the package index offers: a new environment,
this package's wheel, LLaVA, and tests in it. Where the oldest torch fails, the next minor releases are tried until one
passes. The environments are removed again, each as soon as it has been tested. The exit status is 1 if a newest torch
fails, or every release from the oldest on.

The table is printed, and written as JSON (--output) after every environment; a later run goes on from there. --readme
writes it into the README of this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
GENERATIONS = {"llava": "PINS_LLAVA", "current": "PINS_CURRENT"}
RESULTS = HERE / "results" / "versions.json"
#: setup.py's lower bound.
OLDEST_TORCH = Version("2.1")
#: Its upper one.
NEWEST_PYTHON = Version("3.13")
#: torch before this one is built for NumPy 1, and says so only when the two meet.
NUMPY_2 = Version("2.3")
#: What meets torch, transformers, accelerate, PEFT and LLaVA: the maps and losses against their references, capture,
#: training, resuming, checkpoints, merging, evaluation, and the quick start.
TESTS = (
    "test_visual_attention",
    "test_answer_loss",
    "test_losses",
    "test_capture",
    "test_record",
    "test_loader",
    "test_resume",
    "test_checkpoint",
    "test_merging",
    "test_eval_suite",
    "test_end_to_end",
)
#: An environment that fails so often has failed; the rest of its tests is not run.
MOST_FAILURES = 20
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
PIP = ("-m", "pip", "--disable-pip-version-check")
console = Console()


@dataclass
class Cell:
    """One environment and what became of it."""

    python: str
    generation: str
    torch: str  # a release, as the index names it
    transformers: str  # the release that was asked for
    outcome: str = ""  # passed, failed, or not installed
    why: str = ""  # of the last two
    tests: str = ""  # pytest's counts
    versions: dict[str, str] = field(default_factory=dict)  # what was installed
    commit: str = ""
    seconds: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.python, self.generation, self.torch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    parser.add_argument("--pythons", default=",".join(PYTHONS), help="(default: %(default)s)")
    parser.add_argument("--generations", default=",".join(GENERATIONS), help="(default: %(default)s)")
    parser.add_argument("--torch", help="this release alone, and not the oldest and the newest")
    parser.add_argument("--all-tests", action="store_true", help="the whole suite: some ten minutes an environment")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--readme", action="store_true", help="write --output's table into README.md, run nothing")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    done = read(args.output)
    if args.readme:
        write_readme(done)
        return 0
    for name, known in (("pythons", PYTHONS), ("generations", GENERATIONS)):
        unknown = set(getattr(args, name).split(",")) - set(known)
        if unknown:
            console.print(f"--{name}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
            return 2
    wheel, failed = build_wheel(), False
    for python in args.pythons.split(","):
        interpreter = find_python(python)
        if interpreter is None:
            console.print(f"Python {python}: not on this machine; left out.")
            continue
        releases = torch_releases(interpreter)
        for generation in args.generations.split(","):
            chosen = [[args.torch]] if args.torch else [ascending(releases), [releases[-1]]]
            for candidates in chosen:
                for torch in candidates:
                    cell = Cell(python, generation, torch, pinned(generation))
                    if cell.key in done and done[cell.key].commit == commit():
                        cell = done[cell.key]
                    else:
                        console.print(f"Python {python}, {generation}, torch {torch}")
                        measure(cell, interpreter, wheel, args.all_tests)
                        done[cell.key] = cell
                        write(args.output, done)
                    console.print(f"    {cell.outcome}: {cell.why or cell.tests}")
                    if cell.outcome == "passed" or not cell.versions:
                        break  # what does not install with one torch does not with the next
                failed |= cell.outcome == "failed"
    console.print(shown(done))
    return int(failed)


# --------------------------------------------------------------------------------------------------------------------
# Interpreters and packages
# --------------------------------------------------------------------------------------------------------------------
def find_python(version: str) -> str | None:
    """An interpreter of this minor release: on the PATH, or one of pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (f"python{version}", *map(str, sorted(home.glob(f"{version}.*/bin/python"), reverse=True))):
        code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
        try:
            found = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        if found.returncode == 0 and found.stdout.strip() == version:
            return candidate
    return None


def torch_releases(python: str) -> list[str]:
    """The releases of torch that pip finds for this interpreter, ascending, from setup.py's lower bound to what pip
    would install (a constraints file may cap it)."""
    done = subprocess.run([python, *PIP, "index", "versions", "torch"], capture_output=True, text=True)
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"{python} -m pip index versions torch: no list of releases.\n{done.stderr[-1000:]}")
    options = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", "torch")
    done = subprocess.run([python, *PIP, *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} -m pip {' '.join(options)}:\n{done.stderr[-1000:]}")
    newest = Version(json.loads(done.stdout)["install"][0]["metadata"]["version"])
    releases = sorted(map(Version, found.group(1).split(", ")))
    return [str(release) for release in releases if OLDEST_TORCH <= release <= newest]


def ascending(releases: Sequence[str]) -> list[str]:
    """The last patch release of each minor one: what a user who pins an old torch would take."""
    last = {Version(release).release[:2]: release for release in releases}
    return list(last.values())


def pins(generation: str) -> list[str]:
    """The generation's packages and LLaVA's, as scripts/setup_env.sh has them."""
    script = f'source scripts/setup_env.sh; printf "%s\\n" "$LLAVA_PIN" "${{{GENERATIONS[generation]}[@]}}"'
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def pinned(generation: str) -> str:
    """The generation's release of transformers."""
    return dict(pin.split("==") for pin in pins(generation))["transformers"]


def build_wheel() -> Path:
    script = (
        "source scripts/setup_env.sh; lock_environments; ensure_venv .venv; build_wheel .venv/bin/python; echo $WHEEL"
    )
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------------------------
# One environment
# --------------------------------------------------------------------------------------------------------------------
def measure(cell: Cell, interpreter: str, wheel: Path, all_tests: bool) -> None:
    began = time.monotonic()
    cell.commit = commit()
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        venv, work = Path(folder) / "venv", Path(folder) / "empty"
        work.mkdir()
        cell.why = install(cell, interpreter, wheel, venv)
        if cell.why:
            cell.outcome = "not installed"
        else:
            cell.versions = installed(venv)
            run_tests(cell, venv, work, all_tests)
    cell.seconds = round(time.monotonic() - began)


def install(cell: Cell, interpreter: str, wheel: Path, venv: Path) -> str:
    """The reason why it cannot be installed; empty when it is."""
    subprocess.run([interpreter, "-m", "venv", str(venv)], check=True)
    llava, *packages = pins(cell.generation)
    # What has no wheel for this Python is not built here: a compiler for Rust is not asked of a user either.
    binary = ("--no-compile", "--only-binary", "tokenizers,sentencepiece,numpy,scipy,safetensors,torch")
    torch = f"torch=={cell.torch}"
    if Version(cell.torch) < NUMPY_2:
        packages.append("numpy<2")
    # A Python that setup.py does not allow yet is tried, too: what runs there is the question.
    binary = (*binary, "--ignore-requires-python") if Version(cell.python) > NEWEST_PYTHON else binary
    steps = (
        ("install", *binary, "-U", "pip", "setuptools>=64,<81", "wheel"),
        ("install", *binary, torch, *packages, f"{wheel}[dev,tensorboard]"),
        ("install", "--no-compile", "--no-deps", llava),
    )
    for step in steps:
        command = [venv / "bin" / "python", *PIP, *step, "-q"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            return (errors or done.stderr.splitlines() or ["pip failed"])[0].removeprefix("ERROR: ")[:300]
    return ""


def installed(venv: Path) -> dict[str, str]:
    names = ["torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed", "numpy", "llava-torch"]
    code = f"import importlib.metadata as m, json, platform; print(json.dumps({{'python': platform.python_version(), \
**{{n: m.version(n) for n in {names!r}}}}}))"
    done = subprocess.run([venv / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run_tests(cell: Cell, venv: Path, work: Path, all_tests: bool) -> None:
    """From an empty folder, against the installed wheel, as scripts/test.sh does it."""
    files = [ROOT / "tests"] if all_tests else [ROOT / "tests" / f"{name}.py" for name in TESTS]
    command = [venv / "bin" / "python", "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-q"]
    command += ["-p", "no:cacheprovider", "-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    command += ["--no-loadscope-reorder", "-rfE", f"--maxfail={MOST_FAILURES}", *files]
    done = subprocess.run(command, cwd=work, env=environment(venv), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    counts = (line.strip("= ") for line in reversed(lines) if re.search(r"\d (passed|failed|error)", line))
    cell.tests = next(counts, "")
    cell.outcome = "passed" if done.returncode == 0 else "failed"
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        why = (failed or lines or done.stderr.splitlines() or ["pytest failed"])[0][:300]
        cell.why = re.sub(r"^(FAILED|ERROR) \S*?(?=tests/)", "", why)


def environment(venv: Path | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    kept.update(PYTHONNOUSERSITE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    kept.update(COMPODISTILL_SOURCE=str(ROOT))
    if venv:
        kept["PATH"] = f"{venv / 'bin'}{os.pathsep}{kept['PATH']}"
    return kept


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------
def read(path: Path) -> dict[tuple[str, str, str], Cell]:
    if not path.exists():
        return {}
    cells = [Cell(**values) for values in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return {cell.key: cell for cell in cells}


def write(path: Path, cells: dict[tuple[str, str, str], Cell]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python scripts/versions/run.py",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cells": [asdict(cell) for _, cell in sorted(cells.items(), key=_order)],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _order(item: tuple[tuple[str, str, str], Cell]) -> tuple:
    (python, generation, torch), _ = item
    return Version(python), generation != "llava", Version(torch)


def rows(cells: dict[tuple[str, str, str], Cell]) -> Iterator[tuple[str, str, str, str]]:
    """Python, transformers, torch, outcome: a row an environment."""
    for _, cell in sorted(cells.items(), key=_order):
        counts = re.sub(r", \d+ warnings?", "", cell.tests.split(" in ")[0])
        outcome = f"{cell.outcome}: {cell.why}" if cell.why else counts
        torch = cell.versions.get("torch", cell.torch).partition("+")[0]
        yield cell.python, cell.transformers, torch, outcome


def shown(cells: dict[tuple[str, str, str], Cell]) -> Table:
    table = Table("Python", "transformers", "torch", "outcome")
    for row in rows(cells):
        table.add_row(*row)
    return table


def write_readme(cells: dict[tuple[str, str, str], Cell]) -> None:
    path = HERE / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    lines = ["| Python | transformers | torch | outcome |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(cells)]
    lines += ["", f"Commits: {', '.join(sorted({f'`{cell.commit}`' for cell in cells.values()}))}."]
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
