"""A grid of recipes and seeds, trained several at a time, each once: what is there is read back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..about import environment
from ..hosts.files import read_object
from .devices import Stopped
from .recipes import Recipe
from .world import World

RUN_FILE = "run.json"


def run_folder(root: Path, world: World, recipe: Recipe, seed: int) -> Path:
    """Where a run lies: another folder for every other recipe, seed or setting of the world."""
    text = json.dumps(world.settings() | world.models(recipe), sort_keys=True)
    return root / f"{recipe.key}-{hashlib.sha256(text.encode()).hexdigest()[:6]}-seed{seed}"


def finished(folder: Path) -> dict[str, Any] | None:
    """A run's record, or None where it is not finished."""
    path = folder / RUN_FILE
    return read_object(path) if path.is_file() else None


def train_grid(
    world: World,
    recipes: Iterable[Recipe],
    seeds: Iterable[int],
    root: Path,
    jobs: int,
    console: Console,
    ahead: int = 0,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Train and evaluate every recipe with every seed.

    Args:
        jobs: runs at once.
        ahead: more runs that are begun, where a run may have to wait for a stage that another run is training.

    Returns:
        By (recipe's key, seed), the run's record: recipe, seed, scores, checkpoint, seconds, environment.
    """
    unique = {recipe.key: recipe for recipe in map(world.normal, recipes)}
    # Seed by seed: a run that is stopped leaves whole comparisons behind.
    grid = [(recipe, seed) for seed in seeds for recipe in unique.values()]
    found = {(recipe.key, seed): finished(run_folder(root, world, recipe, seed)) for recipe, seed in grid}
    waiting = [(recipe, seed) for recipe, seed in grid if found[recipe.key, seed] is None]
    console.print(
        f"{len(grid) - len(waiting)} of {len(grid)} runs are there, {len(waiting)} to make, {jobs} at a time"
    )
    if not waiting:
        return found
    world.prepare([recipe for recipe, _ in waiting])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with _progress(console) as progress, ThreadPoolExecutor(jobs + ahead) as pool:
        total = progress.add_task("runs", total=len(waiting))
        futures = {
            pool.submit(_run, world, recipe, seed, run_folder(root, world, recipe, seed), threads, progress): recipe
            for recipe, seed in waiting
        }
        try:
            for future in as_completed(futures):
                try:
                    record = future.result()
                except Stopped:  # for another run's failure, which is the one to show
                    continue
                found[futures[future].key, record["seed"]] = record
                progress.advance(total)
        except BaseException:
            for future in futures:
                future.cancel()
            world.stop()
            raise
    return found


def _run(world: World, recipe: Recipe, seed: int, folder: Path, threads: int, progress: Progress) -> dict[str, Any]:
    bar = progress.add_task(f"  {recipe.method} {'+'.join(recipe.stages)}, seed {seed}", total=None)
    try:
        trained = world.train(recipe, seed, folder, threads, lambda: progress.advance(bar))
    finally:
        progress.remove_task(bar)
    record = {
        "recipe": recipe.described(),
        "seed": seed,
        "world": world.settings() | world.models(recipe),
        "environment": environment(),
        **trained,
        "scores": world.evaluate(Path(trained["checkpoint"]), recipe.teacher),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RUN_FILE}.part"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / RUN_FILE)  # whole or not there
    return record


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
