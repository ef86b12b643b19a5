"""The quick start: data, teacher, students, evaluation, table and pictures, in one run.

Every step leaves a file behind and is passed over when the file is there, so that a broken run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llava_compodistill.reproduce.runner import StageFailed

from . import weights
from .settings import METHODS, Settings, override, preset
from .stages import train_student, train_teacher

console = Console()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill miniature quickstart",
        description="Distil a small student from a larger teacher on the miniature world, and compare.",
    )
    parser.add_argument("--preset", default="default", choices=("default", "smoke", "gpu"))
    parser.add_argument(
        "--smoke",
        dest="preset",
        action="store_const",
        const="smoke",
        help="the same in a minute: a few steps",
    )
    parser.add_argument("--gpu", dest="preset", action="store_const", const="gpu", help="larger models and data")
    parser.add_argument("--from-scratch", action="store_true", help="train tower, base models and teacher as well")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of the run (default: runs/miniature[-PRESET])"
    )
    parser.add_argument("--seeds", default="0", help="seeds of the students, separated by commas")
    parser.add_argument("--methods", default=None, help=f"students to train, of {','.join(METHODS)}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of scripts/miniature/settings.py, such as learning_rate=1e-3 (needs its own --output)",
    )
    parser.add_argument("--split", default="test", choices=("val", "test"), help="held-out split to report")
    parser.add_argument(
        "--jobs", type=int, default=None, help="students trained at once (default: one a GPU, or one more than cores)"
    )
    parser.add_argument("--force", action="store_true", help="train and evaluate again what is there already")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`llava-compodistill miniature quickstart`."""
    args = build_parser().parse_args(argv)
    try:
        settings = override(preset(args.preset), args.set)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    if args.methods:
        methods = tuple(args.methods.split(","))
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            console.print(f"--methods {args.methods}: unknown {', '.join(unknown)}; there are {', '.join(METHODS)}.")
            return 2
        settings = replace(settings, methods=methods)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        console.print(f"--seeds {args.seeds}: must be numbers separated by commas, such as 0,1,2.")
        return 2
    root = args.output or Path("runs") / ("miniature" if args.preset == "default" else f"miniature-{args.preset}")
    started = time.monotonic()
    try:
        run(settings, root.resolve(), seeds, args)
    except StageFailed as error:
        console.print(str(error), markup=False)
        return 1
    if args.preset == "smoke":
        console.print(f"{settings.student_steps} steps a student show that all of it runs; its scores mean nothing.")
    console.print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def run(settings: Settings, root: Path, seeds: list[int], args: argparse.Namespace) -> None:
    """Make what is missing, then evaluate and report."""
    from . import report

    root.mkdir(parents=True, exist_ok=True)
    threads = jobs(args.jobs)[1]
    stored = args.preset != "gpu" and not args.from_scratch and weights.have_stored_weights()
    _once(root / "data" / "manifest.json", args.force, "data", lambda: _write_data(settings, root, stored))
    _once(
        root / "models" / "manifest.json", args.force, "models", lambda: _make_models(settings, root, stored, threads)
    )
    runs = _train_students(settings, root, seeds, args)
    results = report.evaluate_runs(settings, root, runs, args.split, console, again=args.force)
    report.publish(results, settings, root, console)


def _once(marker: Path, force: bool, what: str, make: Callable[[], dict[str, Any]]) -> None:
    if marker.is_file() and not force:
        console.print(f"{what}: using {marker.parent}")
        return
    manifest = make()
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")


def _write_data(settings: Settings, root: Path, stored: bool) -> dict[str, Any]:
    from .dataset import write_dataset

    # With the stored teacher there is nobody to read its 20,000 images.
    world = replace(settings.world, instruct_teacher=0) if stored else settings.world
    return write_dataset(root / "data", world, workers=os.cpu_count() or 1)


def _make_models(settings: Settings, root: Path, stored: bool, threads: int) -> dict[str, Any]:
    models = root / "models"
    if stored:
        console.print("models: the stored tower, base model and teacher (--from-scratch trains them)")
        return {"stored": True, **weights.install(models)}
    import torch

    from .language_models import build_language_model
    from .tokenizer import train_tokenizer
    from .tower import train_tower

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # tensors this small lose more than they gain by a second thread
    started = time.monotonic()
    train_tokenizer(models / "tokenizer")
    made: dict[str, Any] = {"stored": False, "settings": asdict(settings)}
    made["tower"] = train_tower(models / "siglip", settings.tower)
    for name, spec, text in (
        ("student", settings.student, settings.student_text),
        ("teacher", settings.teacher, settings.teacher_text),
    ):
        made[name] = build_language_model(models / f"qwen-{name}", models / "tokenizer", spec, text)
    steps = settings.all_teacher_steps
    with _progress() as progress:
        bar = progress.add_task("teacher", total=steps)
        train_teacher(settings, root, threads, lambda: progress.advance(bar, settings.logging_steps))
    made["seconds"] = round(time.monotonic() - started)
    return made


def jobs(requested: int | None) -> tuple[int, int]:
    """(students at once, threads each). Two single-threaded trainings finish sooner than one with two threads.

    One more than there are cores: they share, and the last long one is not left alone at the end.
    """
    import torch

    cores = os.cpu_count() or 1
    count = requested or torch.cuda.device_count() or min(cores, 8) + 1
    return count, max(1, cores // count)


def _train_students(
    settings: Settings, root: Path, seeds: list[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train every method with every seed, several at once; finished ones are read back from their run.json."""
    count, threads = jobs(args.jobs)
    runs: list[dict[str, Any]] = []
    waiting: list[tuple[str, int]] = []
    for seed in seeds:
        for method in settings.methods:
            path = root / "students" / f"{method}-seed{seed}" / "run.json"
            if path.is_file() and not args.force:
                runs.append(finished(path, settings))
            else:
                waiting.append((method, seed))
    # The longest first, so that no core is left with a long one at the end.
    waiting.sort(key=lambda job: (job[1], not METHODS[job[0]].distilled))
    with _progress() as progress, ThreadPoolExecutor(count) as pool:
        futures = {}
        for method, seed in waiting:
            bar = progress.add_task(f"{METHODS[method].label}, seed {seed}", total=settings.student_steps)

            def advance(bar=bar) -> None:
                progress.advance(bar, settings.logging_steps)

            future = pool.submit(train_student, method, seed, settings, root, threads, advance)
            futures[future] = (method, seed, bar)
        try:
            for future in as_completed(futures):
                method, seed, bar = futures[future]
                record = {"method": method, "seed": seed, "settings": recipe(settings), **future.result()}
                path = root / "students" / f"{method}-seed{seed}" / "run.json"
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                runs.append(record)
                progress.update(bar, completed=settings.student_steps)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    order = {method: index for index, method in enumerate(METHODS)}
    return sorted(runs, key=lambda record: (order[record["method"]], record["seed"]))


def recipe(settings: Settings) -> dict[str, Any]:
    """The settings that a student depends on, as JSON holds them."""
    values = json.loads(json.dumps(asdict(settings)))
    return {
        name: value
        for name, value in values.items()
        if name not in ("methods", "similarity_captions", "logging_steps")
    }


def finished(path: Path, settings: Settings) -> dict[str, Any]:
    """Read a student's run.json back.

    Raises:
        StageFailed: when it was trained with other settings, which one table must not mix.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted, found = recipe(settings), record.get("settings", {})
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise StageFailed(
            f"{path.parent} was trained with another {', '.join(changed)}: --force trains it again, --output takes "
            "another folder."
        )
    return record


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
