"""One budget of tuning for every recipe: as many trials, on the same seeds, on the validation split.

A trial is a learning rate and a factor of the weight of the loss that distils (L_ADL, or L_KL in a recipe without
VAT). A recipe that distils nothing has no such weight, and gets as many rates instead. The choice is written down,
with every trial behind it, before the test split is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console

from ..errors import DataError
from ..hosts.files import read_object
from .grid import train_grid
from .recipes import Recipe
from .studies import Study
from .world import World

TUNING_FILE = "tuning.json"


@dataclass(frozen=True)
class Budget:
    """What every recipe gets.

    Attributes:
        rates: learning rates.
        weights: factors of the weight of the loss that distils.
        seeds: of every trial; others than those of the test.
    """

    rates: Sequence[float]
    weights: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (100, 101)

    @property
    def count(self) -> int:
        """Trials a recipe."""
        return len(self.rates) * len(self.weights)

    def trials(self, recipe: Recipe) -> list[Recipe]:
        """What is tried of a recipe: every rate with every factor of its weight, or as many rates between the lowest
        and the highest (in equal ratios) where it has none."""
        if recipe.distils:
            return [
                replace(recipe, rate=rate, weight=None if weight == 1 else weight)
                for rate in self.rates
                for weight in self.weights
            ]
        if len(self.weights) == 1:
            return [replace(recipe, rate=rate) for rate in self.rates]
        between = np.geomspace(min(self.rates), max(self.rates), self.count)
        return [replace(recipe, rate=float(f"{rate:.3g}")) for rate in between]


def tune(
    world: World,
    studies: Sequence[Study],
    budget: Budget,
    root: Path,
    jobs: int,
    console: Console,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Train every row in every trial, choose by the mean over seeds, and write ROOT/tuning.json.

    What is compared is the metric of the first study's gap, or else the world's first. Rows of another teacher than
    the world's own are not tuned, nor are variants of another row (`Study.tuned_as`). A row that was tuned already,
    with as many trials, keeps its choice, whatever the rates: studies that share rows share the file.

    Args:
        world: one that evaluates on the validation split.

    Raises:
        DataError: where rows were tuned with another number of trials.
    """
    metric = studies[0].gap.metric if studies[0].gap is not None else next(iter(world.metrics))
    tuned = [_tuned_as(study, row.recipe, world) for study in studies for row in study.rows.values() if row.recipe]
    measured = {"metric": metric, "seeds": list(budget.seeds), "world": _plain(world.settings())}
    earlier = read_tuning(root)
    kept = earlier is not None and all(earlier.get(name) == value for name, value in measured.items())
    found: dict[str, Any] = {}
    if earlier is not None and not kept:
        console.print(
            f"{root / TUNING_FILE} was made with other seeds or another world, and is replaced.",
            markup=False,
            soft_wrap=True,
        )
    if kept:
        known = {"commit": earlier["environment"]["commit"]}
        found = {key: {**known, **entry} for key, entry in earlier["recipes"].items()}
        counts = {len(entry["trials"]) for entry in found.values()}
        if counts != {budget.count}:
            raise DataError(
                f"{root / TUNING_FILE} holds rows that were tuned with {', '.join(map(str, sorted(counts)))} trials "
                f"each, and this would be {budget.count}: give as many rates and factors, take another --output, or "
                "delete the file."
            )
        if again := found.keys() & {recipe.key for recipe in tuned}:
            console.print(
                f"{len(again)} of the rows are tuned already, with {budget.count} trials each, and keep their "
                f"choice. To tune them again, delete {root / TUNING_FILE}.",
                markup=False,
                soft_wrap=True,
            )
    unique = {recipe.key: recipe for recipe in tuned if recipe.key not in found}
    tried = {key: budget.trials(recipe) for key, recipe in unique.items()}
    grid = [trial for trials in tried.values() for trial in trials]
    runs = train_grid(world, grid, budget.seeds, root / "runs", jobs, console, world.ahead) if grid else {}
    for key, recipe in unique.items():
        scored = [
            {
                "rate": trial.rate,
                "weight": trial.weight,
                "scores": [runs[trial.key, seed]["scores"][metric] for seed in budget.seeds],
            }
            for trial in tried[key]
        ]
        best = max(scored, key=lambda trial: mean(trial["scores"]))  # the first of equals
        chosen = {name: best[name] for name in ("rate", "weight")}
        found[key] = {"commit": environment["commit"], "recipe": recipe.described(), "trials": scored, **chosen}
    record = {**measured, "trials": budget.count, "environment": dict(environment), "recipes": found}
    path = root / TUNING_FILE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _tuned_as(study: Study, recipe: Recipe, world: World) -> Recipe:
    """The recipe whose tuning holds for a row of a study."""
    if study.tuned_as and recipe.distils:
        recipe = study.rows[study.tuned_as].recipe
    return replace(world.normal(recipe), teacher=Recipe.teacher)


def read_tuning(root: Path) -> dict[str, Any] | None:
    """What `tune` has written in a folder, or None."""
    path = root / TUNING_FILE
    if not path.is_file():
        return None
    try:
        record = read_object(path)
        if not (
            record["seeds"]
            and record["environment"]["commit"]
            and all(entry["rate"] > 0 and entry["trials"] for entry in record["recipes"].values())
        ):
            raise ValueError("an entry is empty")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what `reproduce --tune` writes ({error!r}): tune again.") from None


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(settings))


def at_tuned_rates(study: Study, tuning: Mapping[str, Any], world: World) -> Study:
    """The study with each row at the rate and weight that were chosen for it.

    Raises:
        DataError: for a row that was not tuned, or tuned in another world.
    """
    if {**tuning["world"], "split": None} != {**_plain(world.settings()), "split": None}:
        raise DataError(
            f"{TUNING_FILE} was made with other settings of the world: run `reproduce {study.name} --tune RATES` once "
            "more, or take another --output."
        )
    rows = {}
    for name, row in study.rows.items():
        if row.recipe is None:
            rows[name] = row
            continue
        normal = world.normal(row.recipe)
        entry = tuning["recipes"].get(_tuned_as(study, row.recipe, world).key)
        if entry is None:
            raise DataError(
                f"{TUNING_FILE} has no learning rate for “{row.label}” of {study.name}: run `reproduce {study.name} "
                "--tune RATES` with the same --output."
            )
        rows[name] = replace(row, recipe=replace(normal, rate=entry["rate"], weight=entry["weight"]))
    return replace(study, rows=rows)


def tuning_section(studies: Sequence[Study], tuning: Mapping[str, Any] | None, world: World) -> str:
    """The tuning log as a section of a report; None says that there was none."""
    title = "## How each method was tuned\n\n"
    if tuning is None:
        return f"{title}No method was tuned: all trained with the world's own settings (`--tune`).\n"
    labels = {
        world.normal(replace(row.recipe, rate=None, weight=None)).key: row.label
        for study in studies
        for row in study.rows.values()
        if row.recipe is not None
    }
    metric = world.metrics.get(tuning["metric"], tuning["metric"])
    last = tuning["environment"]["commit"]
    commits = ", ".join(dict.fromkeys(entry.get("commit", last) for entry in tuning["recipes"].values()))
    count = max(len(entry["trials"]) for entry in tuning["recipes"].values())
    lines = [
        f"Every method had the same {count} trials with the seeds {', '.join(map(str, tuning['seeds']))}, compared on "
        f"the validation split ({metric}, mean over seeds; commit {commits}). A trial is a "
        "learning rate and, after ×, a factor of the weight of the loss that distils: of L_ADL, or of L_KL without "
        "VAT. The chosen one is bold.",
        "",
        "| method |" + " |" * count,
        "|---" * (count + 1) + "|",
    ]
    for key, entry in tuning["recipes"].items():
        cells = []
        for trial in entry["trials"]:
            factor = "" if trial["weight"] is None else f" × {trial['weight']:g}"
            text = f"{trial['rate']:g}{factor}: {mean(trial['scores']):.1f}"
            if len(trial["scores"]) > 1:
                text += f" ({', '.join(f'{value:.1f}' for value in trial['scores'])})"
            bold = (trial["rate"], trial["weight"]) == (entry["rate"], entry["weight"])
            cells.append(f"**{text}**" if bold else text)
        lines.append(f"| {labels.get(key, key)} | {' | '.join(cells)} |")
    return title + "\n".join([*lines, ""])
