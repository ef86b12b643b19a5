"""The paper's figures of attention (2, 3 and 4) from a grid's students, over seeds, each with its claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..analysis.experiments import (
    Bins,
    Intervention,
    Mean,
    answer_scores,
    depth_of,
    intervene,
    probability_by_similarity,
    similarity_by_layer,
)
from ..analysis.plots import draw_intervention, draw_probability, draw_similarity
from ..hosts.files import read_json
from ..pair.layers import visual_understanding_layers
from .claims import Verdict, judge
from .recipes import COMPODISTILL, KD, SFT, Recipe
from .studies import LLAVA_KD, Claim
from .world import World

#: The students that the figures compare.
STUDENTS: dict[str, Recipe] = {"SFT": SFT, "KD": KD, "LLaVA-KD": LLAVA_KD, "CompoDistill": COMPODISTILL}
#: What the paper's models of recognition and of compositional reasoning are shown on.
KINDS = {"vqa": "recognition (VQA)", "cr": "captions (CR)"}


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        title: what it shows.
        claims: the paper's; rows are students, or what `measure` calls its values.
        measure: (world, teacher, student, settings) -> figures of one student, as JSON holds them.
        draw: (by student and seed what was measured, path) -> the picture.
        scores: what was measured -> {metric: value} for the claims.
    """

    title: str
    claims: tuple[Claim, ...]
    measure: Callable[..., dict[str, Any]]
    draw: Callable[[Mapping[str, Sequence[dict[str, Any]]], World, Path], Path]
    scores: Callable[[dict[str, Any]], dict[str, float]]


def over_seeds(values: Sequence[float]) -> Mean:
    """Mean over seeds, with a standard error as half-width."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return Mean(mean(values), spread / math.sqrt(len(values)), len(values))


# ---------------------------------------------------------------------------------------------------------------------
# Figure 2: similarity by layer
# ---------------------------------------------------------------------------------------------------------------------
def _measure_similarity(world: World, teacher: Any, student: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"band": visual_understanding_layers(depth_of(student), world.band)}
    for kind in KINDS:
        for keys in ("visual", "text"):
            values = similarity_by_layer(teacher, student, world.samples(kind), keys)
            found[f"{kind} {keys}"] = [mean(layer) for layer in zip(*values, strict=True)]
    return found


def _similarity_in_band(found: dict[str, Any]) -> dict[str, float]:
    return {
        name: 100 * mean(values[layer] for layer in found["band"]) for name, values in found.items() if name != "band"
    }


def _draw_similarity(found: Mapping[str, Sequence[dict[str, Any]]], world: World, path: Path) -> Path:
    curves = {
        (KINDS[kind], keys): {
            student: [over_seeds(values) for values in zip(*(run[f"{kind} {keys}"] for run in runs), strict=True)]
            for student, runs in found.items()
        }
        for kind in KINDS
        for keys in ("visual", "text")
    }
    first = next(iter(found.values()))[0]
    depth = len(first["vqa visual"])
    band = first["band"][0] / depth, (first["band"][-1] + 1) / depth
    return draw_similarity(curves, "the teacher", band, path, unit="seeds", bands="standard errors over seeds")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3: probability against similarity
# ---------------------------------------------------------------------------------------------------------------------
def _measure_probability(world: World, teacher: Any, student: Any) -> dict[str, Any]:
    samples = world.samples("vqa")
    layers = visual_understanding_layers(depth_of(student), world.band)
    values = similarity_by_layer(teacher, student, samples)
    alike = [mean(sample[layer] for layer in layers) for sample in values]
    probabilities, _ = answer_scores(student, samples)
    bins = probability_by_similarity(alike, probabilities, min(10, len(samples)))
    return {
        "similarity": [point.value for point in bins.similarity],
        "probability": [point.value for point in bins.probability],
        "n": [point.n for point in bins.probability],
        "correlation": bins.correlation,
        "p": bins.p,
    }


def _draw_probability(found: Mapping[str, Sequence[dict[str, Any]]], world: World, path: Path) -> Path:
    curves = {
        student: Bins(
            [over_seeds(values) for values in zip(*(run["similarity"] for run in runs), strict=True)],
            [over_seeds(values) for values in zip(*(run["probability"] for run in runs), strict=True)],
            mean(run["correlation"] for run in runs),
            float("nan"),
        )
        for student, runs in found.items()
    }
    count = sum(next(iter(found.values()))[0]["n"])
    return draw_probability(curves, "the teacher", path, count=count, bars="standard errors over seeds")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4: intervention
# ---------------------------------------------------------------------------------------------------------------------
def _measure_intervention(world: World, teacher: Any, student: Any) -> dict[str, Any]:
    found = intervene(teacher, student, world.samples("cr"), band=world.band)
    return {
        name: {"before": found.before[name].value, "after": found.after[name].value, "n": value.n}
        for name, value in found.difference.items()
    }


def _draw_intervention(found: Mapping[str, Sequence[dict[str, Any]]], world: World, path: Path) -> Path:
    results = {}
    for student, runs in found.items():
        result = Intervention()
        for name in runs[0]:
            change = over_seeds([run[name]["after"] - run[name]["before"] for run in runs])
            result.difference[name] = Mean(change.value, change.half, runs[0][name]["n"])
        results[student] = result
    return draw_intervention(results, path, bars="standard errors over seeds")


FIGURES = {
    "figure2": Figure(
        "Figure 2: similarity of attention to the teacher, by layer",
        (
            Claim("on VQA, KD looks more like the teacher than SFT does", "KD", "SFT", "vqa visual"),
            Claim("on CR, KD looks more like the teacher than SFT does (the paper: no)", "KD", "SFT", "cr visual"),
            Claim("on CR, CompoDistill looks more like the teacher than KD does", "CompoDistill", "KD", "cr visual"),
        ),
        _measure_similarity,
        _draw_similarity,
        _similarity_in_band,
    ),
    "figure3": Figure(
        "Figure 3: probability of the answer against the similarity of attention",
        (Claim("KD's answers are likelier where it looks like the teacher", "KD", "0", "correlation"),),
        _measure_probability,
        _draw_probability,
        lambda found: {"correlation": 100 * found["correlation"]},
    ),
    "figure4": Figure(
        "Figure 4: the mean of the teacher's and the student's attention",
        (Claim("the teacher's attention helps KD in compositional reasoning", "KD", "0", "change"),),
        _measure_intervention,
        _draw_intervention,
        lambda found: {"change": found[""]["after"] - found[""]["before"]},
    ),
}


@dataclass(frozen=True)
class Drawn:
    """A figure of a grid: its picture, its verdicts, and the figures by student and seed."""

    figure: Figure
    picture: Path
    verdicts: list[Verdict]
    values: dict[str, dict[int, dict[str, Any]]]


def draw(
    name: str, runs: Mapping[tuple[str, int], Mapping[str, Any]], world: World, seeds: Sequence[int], root: Path
) -> Drawn:
    """Measure what is missing of a figure (kept beside each checkpoint), draw it and judge its claims."""
    figure = FIGURES[name]
    teacher: Any = None
    values: dict[str, dict[int, dict[str, Any]]] = {}
    for student, recipe in STUDENTS.items():
        for seed in seeds:
            run = runs[world.normal(recipe).key, seed]
            kept = Path(run["checkpoint"]) / f"{name}.json"
            if not kept.is_file():
                teacher = teacher or world.load(None)
                measured = figure.measure(world, teacher, world.load(Path(run["checkpoint"])))
                kept.write_text(json.dumps(measured) + "\n", encoding="utf-8")
            values.setdefault(student, {})[seed] = read_json(kept)
    picture = figure.draw(
        {student: list(found.values()) for student, found in values.items()}, world, root / f"{name}.png"
    )
    verdicts = []
    for claim in figure.claims:
        scores = {
            student: {seed: figure.scores(found)[claim.metric] for seed, found in by_seed.items()}
            for student, by_seed in values.items()
        }
        verdict = judge(claim, {**scores, "0": dict.fromkeys(seeds, 0.0)})
        if verdict is not None:
            verdicts.append(verdict)
    return Drawn(figure, picture, verdicts, values)
