"""Parallel students: python scripts/scale/run.py [--modes ddp,zero2,zero3,fsdp2] [--kinds full,lora]

Every stage from every earlier one's checkpoint, on two CPU processes: losses and weights against one process, going on
from a checkpoint in the middle and from the last one, and what LLaVA's builder loads. README.md says what the columns
are. The exit status is 1 if anything is apart by more than rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The checkout's package, so that the commit in the report is the code that ran; this folder and the miniature.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from scale import modes, world  # noqa: E402
from scale.matrix import TOLERANCE, Cell, Matrix, made_with  # noqa: E402
from scale.ranks import Ranks  # noqa: E402

COLUMNS = ("losses", "grad_norm", "weights", "moved", "resumed", "resumed_losses", "at_end", "logits")
console = Console()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    parser.add_argument("--modes", default=",".join(modes.MODES), help="some of the default: %(default)s")
    parser.add_argument("--kinds", default="full,lora", help="of fine-tuning: some of %(default)s")
    parser.add_argument("--output", type=Path, help="a CSV file of all cells; a JSON file of the same name beside it")
    parser.add_argument(
        "--keep",
        type=Path,
        help="a folder for all runs, which stay there; those that are done are not run again",
    )
    return parser


def main() -> int:
    args = build_parser().parse_args()
    chosen, kinds = args.modes.split(","), tuple(args.kinds.split(","))
    for name, given, known in (("modes", chosen, modes.MODES), ("kinds", kinds, ("full", "lora"))):
        unknown = [each for each in given if each not in known]
        if unknown:
            console.print(f"--{name}: unknown {', '.join(unknown)}; there are {', '.join(known)}.")
            return 2
    folder = args.keep or Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        cells = run(folder.resolve(), chosen, kinds)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if not cells:
        return 2  # what is missing has been said
    console.print(table(cells))
    for cell in cells:
        if cell.problem:
            console.print(f"{cell.mode} {cell.run}: {cell.problem}", markup=False)
    if args.output:
        write(args.output, cells)
    return int(not all(cell.holds for cell in cells))


def run(folder: Path, chosen: list[str], kinds: tuple[str, ...]) -> list[Cell]:
    """All cells of some modes; those that cannot run here are named and left out."""
    known = world.World(folder) if (folder / "models").exists() else world.make(folder)
    links = world.links(kinds)
    cells: list[Cell] = []
    with Ranks() as ranks:
        matrix = Matrix(known, ranks)
        for link in links:
            problem = matrix.reference(link)
            if problem is not None:
                raise RuntimeError(f"{link.name} on one process: {problem}")
        for mode in chosen:
            if modes.missing(mode):
                console.print(f"{mode}: not run, {modes.missing(mode)}.")
                continue
            found = {}
            for link in links:
                found[link.name] = matrix.cell(mode, link)
                console.print(f"{mode} {link.name}: {found[link.name].problem or 'ran'}", markup=False)
            matrix.load(mode, links, found)
            cells += found.values()
    return cells


def table(cells: list[Cell]) -> Table:
    shown = Table(box=box.SIMPLE, title="Largest relative differences")
    for name in ("mode", "run", *COLUMNS, ""):
        shown.add_column(name, justify="left" if name in ("mode", "run", "") else "right")
    for cell in cells:
        values = asdict(cell)
        numbers = ["–" if values[name] is None else f"{values[name]:.1e}" for name in COLUMNS]
        shown.add_row(cell.mode, cell.run, *numbers, "holds" if cell.holds else "[red]APART")
    return shown


def write(path: Path, cells: list[Cell]) -> None:
    """The cells as CSV, and with what they were made with and held to as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(cell), "holds": cell.holds} for cell in cells]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    content = {**made_with(), "processes": 2, "tolerance": TOLERANCE, "cells": rows}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
