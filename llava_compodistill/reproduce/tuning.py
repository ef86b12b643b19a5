"""One budget of tuning for every recipe: the same learning rates, the same seeds, on the validation split.

The choice is written down, with every run behind it, before the test split is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from ..errors import DataError
from .grid import train_grid
from .studies import Study
from .world import World

TUNING_FILE = "tuning.json"


def tune(
    world: World,
    studies: Sequence[Study],
    rates: Sequence[float],
    seeds: Sequence[int],
    root: Path,
    jobs: int,
    console: Console,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Train every row at every rate, choose by the mean over seeds, and write ROOT/tuning.json.

    What is compared is the metric of the first study's gap, or else the world's first.

    Args:
        world: one that evaluates on the validation split.
        seeds: others than those of the test.
    """
    metric = studies[0].gap.metric if studies[0].gap is not None else next(iter(world.metrics))
    recipes = [row.recipe for study in studies for row in study.rows.values() if row.recipe is not None]
    unique = {recipe.key: recipe for recipe in map(world.normal, recipes)}
    grid = [replace(recipe, rate=rate) for recipe in unique.values() for rate in rates]
    runs = train_grid(world, grid, seeds, root / "runs", jobs, console, world.ahead)
    measured = {"metric": metric, "rates": list(rates), "seeds": list(seeds), "world": _plain(world.settings())}
    earlier = read_tuning(root)
    # Studies that are tuned one after the other share the file, and the budget.
    kept = earlier is not None and all(earlier.get(name) == value for name, value in measured.items())
    found: dict[str, Any] = dict(earlier["recipes"]) if kept else {}
    for recipe in unique.values():
        scores = {
            rate: [runs[replace(recipe, rate=rate).key, seed]["scores"][metric] for seed in seeds] for rate in rates
        }
        means = {rate: mean(values) for rate, values in scores.items()}
        best = max(rates, key=means.__getitem__)  # the first of equals
        found[recipe.key] = {
            "recipe": recipe.described(),
            "scores": {f"{rate:g}": values for rate, values in scores.items()},
            "rate": best,
        }
    record = {**measured, "environment": dict(environment), "recipes": found}
    path = root / TUNING_FILE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def read_tuning(root: Path) -> dict[str, Any] | None:
    """What `tune` has written in a folder, or None."""
    path = root / TUNING_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not (
            record["seeds"] and all(entry["rate"] > 0 and entry["scores"] for entry in record["recipes"].values())
        ):
            raise ValueError("an entry is empty")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what `reproduce --tune` writes ({error!r}): tune again.") from None


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(settings))


def at_tuned_rates(study: Study, tuning: Mapping[str, Any], world: World) -> Study:
    """The study with each row at the rate that was chosen for it.

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
        entry = tuning["recipes"].get(normal.key)
        if entry is None:
            raise DataError(
                f"{TUNING_FILE} has no learning rate for “{row.label}” of {study.name}: run `reproduce {study.name} "
                "--tune RATES` with the same --output."
            )
        rows[name] = replace(row, recipe=replace(normal, rate=entry["rate"]))
    return replace(study, rows=rows)


def tuning_section(studies: Sequence[Study], tuning: Mapping[str, Any] | None, world: World) -> str:
    """The tuning log as a section of a report; None says that there was none."""
    title = "## How the learning rates were chosen\n\n"
    if tuning is None:
        return f"{title}No method was tuned: all trained at the world's own learning rate (`--tune`).\n"
    labels = {
        world.normal(replace(row.recipe, rate=None)).key: row.label
        for study in studies
        for row in study.rows.values()
        if row.recipe is not None
    }
    rates = [f"{rate:g}" for rate in tuning["rates"]]
    metric = world.metrics.get(tuning["metric"], tuning["metric"])
    lines = [
        f"Every method was trained at the same {len(rates)} rates with the seeds "
        f"{', '.join(map(str, tuning['seeds']))}, and compared on the validation split ({metric}, mean over seeds, "
        f"single seeds in brackets; commit {tuning['environment']['commit']}). The chosen rate is bold.",
        "",
        "| method | " + " | ".join(rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for key, entry in tuning["recipes"].items():
        cells = []
        for rate in rates:
            values = entry["scores"][rate]
            text = f"{mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
            cells.append(f"**{text}**" if f"{entry['rate']:g}" == rate else text)
        lines.append(f"| {labels.get(key, key)} | {' | '.join(cells)} |")
    return title + "\n".join([*lines, ""])
