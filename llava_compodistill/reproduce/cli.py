"""`llava-compodistill reproduce TABLE|all`: train what is missing of a table, and report it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..cli.miniature import find_scripts
from .grid import train_grid
from .studies import STUDIES
from .world import World

PRESETS = {
    "smoke": "the miniature world, a few steps a student: to see that all of it runs",
    "cpu": "the miniature world at the quick start's size: about 5 minutes a student and core",
}


def build_parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<9} {study.title.split(': ', 1)[1]}" for name, study in STUDIES.items())
    presets = "\n".join(f"  {name:<9} {text}" for name, text in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="llava-compodistill reproduce",
        description="Train the rows of the paper's tables, several at a time, and report them beside its figures.",
        epilog=f"tables:\n{names}\n\npresets:\n{presets}\n\nFinished runs are kept in --output and not made again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="+", metavar="TABLE", help="tables, or all")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the students (default: 0,1,2)")
    parser.add_argument("--output", type=Path, default=None, help="folder (default: runs/reproduce-PRESET)")
    parser.add_argument("--jobs", type=int, default=None, help="students at once (default: one a core or GPU)")
    parser.add_argument(
        "--list", action="store_true", help="show the rows and which runs are there, and train nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`llava-compodistill reproduce`."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names = list(STUDIES) if args.studies == ["all"] else args.studies
    unknown = [name for name in names if name not in STUDIES]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: there are {', '.join(STUDIES)} and all.")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}: must be numbers separated by commas, such as 0,1,2.")
    console = Console()
    root = (args.output or Path("runs") / f"reproduce-{args.preset}").resolve()
    world = make_world(args.preset, root)
    studies = [STUDIES[name] for name in names]
    recipes = [row.recipe for study in studies for row in study.rows.values() if row.recipe is not None]
    jobs = args.jobs or _devices()
    train_grid(world, recipes, seeds, root / "runs", jobs, console)
    return 0


def make_world(preset: str, root: Path) -> World:
    """The world of a preset."""
    sys.path.insert(0, str(find_scripts()))
    from miniature.reproduction import MiniatureWorld

    return MiniatureWorld(preset, root)


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1
