"""`llava-compodistill reproduce TABLE|FIGURE|all`: train what is missing of a table, and report it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from ..about import environment
from ..cli.miniature import find_scripts
from ..errors import DataError
from ..hosts.files import read_object
from . import evidence
from .grid import finished, run_folder, train_grid
from .recipes import COMPODISTILL, KD, SFT, Recipe
from .report import collect, figure_markdown, markdown, write
from .studies import ALIASES, LLAVA_KD, STUDIES, Study
from .tuning import TUNING_FILE, Budget, at_tuned_rates, read_tuning, tune, tuning_section
from .world import World

PRESETS = {
    "smoke": "the miniature world, a few steps a student: to see that all of it runs",
    "cpu": "the miniature world at the quick start's size: about 5 minutes a student and core",
    "gpu": "full-size models and data, as --world names them, through the training scripts: hours a stage",
}

#: Figures of attention, and what they show; `figures` draws them.
FIGURES = {
    "figure2": "similarity of attention to the teacher, by layer",
    "figure3": "probability of the answer against the similarity of attention",
    "figure4": "the mean of the teacher's and the student's attention",
}
FIGURE_STUDENTS = [SFT, KD, LLAVA_KD, COMPODISTILL]
TUNING_SEEDS = (100, 101)


def build_parser() -> argparse.ArgumentParser:
    titles = {name: study.title.split(": ", 1)[1] for name, study in STUDIES.items()} | FIGURES
    titles |= {name: study.title.split(": ", 1)[1] for name, study in evidence.STUDIES.items()}
    names = "\n".join(f"  {name:<9} {title}" for name, title in titles.items())
    names += "\n" + "\n".join(f"  {name:<9} the same as {other}" for name, other in ALIASES.items())
    presets = "\n".join(f"  {name:<9} {text}" for name, text in PRESETS.items())
    kept = "Finished runs stay in --output, and are not made again."
    parser = argparse.ArgumentParser(
        prog="llava-compodistill reproduce",
        description="Train the rows of the paper's tables, several at a time, and report them beside its figures.",
        epilog=f"tables and figures:\n{names}\n\npresets:\n{presets}\n\n{kept}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="+", metavar="TABLE|FIGURE", help="tables and figures, or all of the paper's")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--world", type=Path, default=None, metavar="FILE",
        help="YAML or JSON: models and data of --preset gpu (default: the paper's, where the scripts expect them)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", default=None, help="seeds of the students (default: 0,1,2; 0 to 7 for evidence; 100,101 for --tune)"
    )
    parser.add_argument(
        "--tune", default=None, metavar="RATES",
        help="train the rows at each of these learning rates, choose on the validation split, and write "
        f"{TUNING_FILE} to --output: evidence then takes what was chosen",
    )  # fmt: skip
    parser.add_argument(
        "--tune-weights", default=None, metavar="FACTORS",
        help="with --tune: at each rate, multiply the weight of the loss that distils by each of these (default: 1); "
        "SFT, which has none, gets as many rates instead",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="folder (default: runs/reproduce-PRESET)")
    parser.add_argument(
        "--jobs", type=int, default=None, help="students trained at once (default: one per core, GPU or set of GPUs)"
    )
    parser.add_argument(
        "--list", action="store_true", help="show the rows and which runs are there, and train nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`llava-compodistill reproduce`."""
    parser = build_parser()
    args = parser.parse_args(argv)
    known = {**STUDIES, **evidence.STUDIES}
    asked = [*STUDIES, *FIGURES] if args.studies == ["all"] else [ALIASES.get(name, name) for name in args.studies]
    names = list(dict.fromkeys(asked))
    unknown = [name for name in names if name not in known and name not in FIGURES]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: there are {', '.join((*known, *FIGURES, *ALIASES))} and all.")
    studies = [known[name] for name in names if name in known]
    figures = [name for name in names if name in FIGURES]
    seeds, rates = _numbers(parser, "--seeds", args.seeds, int), _numbers(parser, "--tune", args.tune, float)
    if rates and min(rates) <= 0:
        parser.error(f"--tune {args.tune}: learning rates are greater than 0.")
    weights = _numbers(parser, "--tune-weights", args.tune_weights, float)
    if weights and min(weights) <= 0:
        parser.error(f"--tune-weights {args.tune_weights}: factors are greater than 0.")
    if weights and not rates:
        parser.error("--tune-weights: goes with --tune RATES.")
    if rates and (args.preset == "gpu" or not studies):
        parser.error("--tune: needs a table, and a world with a validation split (--preset cpu or smoke).")
    count = max((study.seeds for study in studies), default=3)
    seeds = seeds or list(TUNING_SEEDS if rates else range(count))
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more.")
    if args.world is not None and args.preset != "gpu":
        parser.error(f"--world: --preset {args.preset} makes its own models and data; --preset gpu reads the file.")
    console = Console()
    root = (args.output or Path("runs") / f"reproduce-{args.preset}").resolve()
    world = make_world(args.preset, root, args.world, "val" if rates else "test")
    jobs = args.jobs or world.jobs or _devices()
    if rates:
        return _tune(studies, Budget(rates, weights or [1.0], seeds), world, root, jobs, console)
    tuning = read_tuning(root) if any(study.family for study in studies) else None
    if tuning is not None:
        try:
            studies = [at_tuned_rates(study, tuning, world) if study.family else study for study in studies]
        except DataError as error:
            console.print(str(error), markup=False, soft_wrap=True)
            return 2
    world.curve = world.curve or max((study.curve for study in studies), default=0)
    recipes, figures, reasons = _possible(studies, figures, world)
    for text in reasons:
        console.print(text, markup=False, soft_wrap=True)
    if reasons and not recipes:
        return 2
    if args.list:
        console.print(listing(studies, seeds, world, root / "runs"))
        return 0
    runs = train_grid(world, recipes, seeds, root / "runs", jobs, console, world.ahead)
    names = {row.teacher for study in studies for row in study.rows.values() if row.recipe is None}
    teachers = {name: _teacher(world, root, name) for name in sorted({"default", *names})} if studies else {}
    findings = [collect(study, runs, world, seeds, teachers) for study in studies]
    chosen = ",".join(map(str, seeds))
    command = f"llava-compodistill reproduce {' '.join(args.studies)} --preset {args.preset} --seeds {chosen}"
    command += f" --world {args.world}" if args.world else ""
    drawn = _drawn(figures, runs, world, seeds, root)
    families = [study for study in studies if study.family]
    more = [tuning_section(families, tuning, world)] if families else []
    more += evidence.curve_sections(studies, runs, world, seeds, root)
    paths = write(findings, runs, world, root, command, environment(), drawn, teachers.get("default"), more, tuning)
    for found in findings:
        console.print(Markdown(markdown(found, world)))
    for figure in drawn:
        console.print(Markdown(figure_markdown(figure)))
    for path in paths:
        console.print(str(path), soft_wrap=True)
    return 0


def _numbers(parser: argparse.ArgumentParser, flag: str, value: str | None, kind: type) -> list[Any]:
    try:
        return [] if value is None else [kind(number) for number in value.split(",")]
    except ValueError:
        example = "0,1,2" if kind is int else "1e-3,2e-3"
        parser.error(f"{flag} {value}: must be numbers separated by commas, such as {example}.")


def _tune(
    studies: Sequence[Study],
    budget: Budget,
    world: World,
    root: Path,
    jobs: int,
    console: Console,
) -> int:
    record = tune(world, studies, budget, root, jobs, console, environment())
    console.print(Markdown(tuning_section(studies, record, world)))
    console.print(str(root / TUNING_FILE), soft_wrap=True)
    return 0


def _possible(
    studies: Sequence[Study], figures: Sequence[str], world: World
) -> tuple[list[Recipe], list[str], list[str]]:
    """(the recipes that the world can train, the figures that it can draw, what is left out and why)."""
    recipes: list[Recipe] = []
    reasons: list[str] = []
    for study in studies:
        rows = [row for row in study.rows.values() if row.recipe is not None]
        refused = [(row.label, world.refusal(row.recipe)) for row in rows]
        recipes += [row.recipe for row, (_, why) in zip(rows, refused, strict=True) if why is None]
        for reason in dict.fromkeys(why for _, why in refused if why is not None):
            labels = [label for label, why in refused if why == reason]
            reasons.append(f"{study.name} {reason}; left out: {', '.join(labels)}.")
    if figures:
        refused = {world.refusal(recipe) for recipe in FIGURE_STUDENTS} | {world.refusal_of_figures()}
        reasons += [f"{figure} {why}; left out." for why in sorted(refused - {None}) for figure in figures]
        if refused != {None}:
            return recipes, [], reasons
        recipes += FIGURE_STUDENTS
    return recipes, list(figures), reasons


def _drawn(names: Sequence[str], runs: Any, world: World, seeds: Sequence[int], root: Path) -> list[Any]:
    if not names:
        return []
    from .figures import draw

    world.prepare([])
    return [draw(name, runs, world, seeds, root) for name in names]


def _teacher(world: World, root: Path, name: str) -> dict[str, Any]:
    """A teacher's figures, measured once."""
    path = root / ("teacher.json" if name == "default" else f"teacher-{name}.json")
    settings = json.loads(json.dumps(world.settings()))
    kept = read_object(path) if path.is_file() else {}
    if kept.get("world") != settings:
        world.prepare([])
        kept = {"world": settings, "scores": world.evaluate(None, name)}
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return kept["scores"]


def listing(studies: Sequence[Study], seeds: Sequence[int], world: World, root: Path) -> Table:
    """The rows of studies, and which of their runs are finished."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("table", "row", "stages", "method", "steps", "finished seeds"):
        table.add_column(name)
    for study in studies:
        for row in study.rows.values():
            if row.recipe is None:
                table.add_row(study.name, row.label, "", "", "", "")
                continue
            recipe = world.normal(row.recipe)
            done = [str(seed) for seed in seeds if finished(run_folder(root, world, recipe, seed))]
            steps = None if world.refusal(row.recipe) else world.steps(recipe)
            number = "?" if steps is None else f"{steps:,}"
            cells = (" ".join(recipe.stages), recipe.method, number, ", ".join(done) or "-")
            table.add_row(study.name, row.label, *cells)
    return table


def make_world(preset: str, root: Path, file: Path | None = None, split: str = "test") -> World:
    """The world of a preset.

    Args:
        file: names models and data of `gpu`; None takes the paper's.
        split: held-out split of the miniature's figures, val or test.
    """
    if preset == "gpu":
        from .fullsize import FullSizeWorld
        from .worldfile import read_world_file

        return FullSizeWorld(read_world_file(file), root)
    sys.path.insert(0, str(find_scripts()))
    from miniature.reproduction import MiniatureWorld

    return MiniatureWorld(preset, root, split)


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1
