"""POPE (arXiv 2305.10355): is there such an object in the image? Yes/no questions of three categories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...errors import DataError
from ...hosts.files import parse_json
from ..reading import YES_NO_READINGS, Reading
from . import figures, register
from .base import Record
from .files import read_text, yes_no_label
from .llava import Answers, LlavaBenchmark, Records, plain_records, read_questions
from .sums import Sums, mean_f1

QUESTIONS = "pope/llava_pope_test.jsonl"


STRICT, OFFICIAL = YES_NO_READINGS
#: The lists that LLaVA's questions belong to.
_COMMIT = "e3e3926 of github.com/AoiDragon/POPE"


def records(data: Path, answers: Answers) -> Records:
    """Labels: DATA/pope/coco/coco_pope_CATEGORY.json, one a line, in the order of the category's questions (as LLaVA's
    eval_pope takes them); the questions have the categories."""
    categories = _categories(data)
    if len(answers) != len(categories):
        raise DataError(
            f"{data / QUESTIONS} has {len(categories)} questions, and there are {len(answers)} answers: they do not "
            "belong together, or the answers are not whole. Ask again what is missing (scripts/eval/pope.sh)."
        )
    places = {category: iter(values) for category, values in _labels(data, categories).items()}
    return [
        {**record, "category": category, "label": next(places[category])}
        for record, category in zip(plain_records(data, answers), categories, strict=True)
    ]


def verify(data: Path) -> None:
    """Whether the labels are those of the questions: POPE's lists have changed since."""
    _labels(data, _categories(data))


def _categories(data: Path) -> list[str]:
    return [str(entry.get("category")) for entry in read_questions(data / QUESTIONS)]


def _labels(data: Path, categories: Sequence[str]) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    for category in dict.fromkeys(categories):
        path = data / "pope" / "coco" / f"coco_pope_{category}.json"
        try:
            lines = read_text(path).splitlines()
            places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
            labels[category] = [
                yes_no_label(parse_json(line, place), place) for line, place in zip(lines, places, strict=True)
            ]
        except FileNotFoundError:
            raise DataError(f"{path} is missing: it has the labels of the category {category!r}.") from None
        if len(lines) != categories.count(category):
            raise DataError(
                f"{path}: {len(lines)} labels for {categories.count(category)} questions. LLaVA's questions belong to "
                f"the lists at commit {_COMMIT} (random has 2,910 there; later lists have 3,000)."
            )
    return labels


def score(records: Iterable[Record], reading: Reading = STRICT) -> dict[str, Any]:
    """Yes/no figures of each `category` and their means."""
    records = list(records)
    groups = sorted(figures.grouped(records, "category").items())
    categories = {name: figures.yes_no_figures(items, reading.yes_no) for name, items in groups}
    by_category = {
        f"{name}_{category}": entry[name]
        for category, entry in categories.items()
        for name in ("f1", "accuracy", "yes_ratio")
    }
    return {
        **figures.means_of_yes_no(categories.values()),
        **by_category,
        "items": len(records),
        "unparsable": figures.unparsable(records, reading.yes_no),
    }


def sums(records: Sequence[Record]) -> Sums:
    """The mean F1 of the categories."""
    return mean_f1(
        records, lambda record: [record["category"]], lambda record: f"{record['label']} {record['category']}"
    )


def read_printed(text: str) -> dict[str, float]:
    """eval_pope prints a block a category; shares, here in %."""
    found: dict[str, float] = {}
    for block in text.split("Category: ")[1:]:
        category = block.split(",")[0]
        for name, label in (("accuracy", "Accuracy"), ("f1", "F1 score"), ("yes_ratio", "Yes ratio")):
            match = re.search(rf"{label}: ([\d.]+)", block)
            if match:
                found[f"{name}_{category}"] = 100 * float(match.group(1))
    for name in ("f1", "accuracy"):
        values = [value for key, value in found.items() if key.startswith(f"{name}_")]
        if values:
            found[name] = mean(values)
    return found


register(
    LlavaBenchmark(
        name="pope",
        title="POPE",
        headline="f1",
        questions=QUESTIONS,
        images="pope/val2014",
        needs="pope/coco",
        records=records,
        verify=verify,
        score=score,
        sums=sums,
        readings=YES_NO_READINGS,
        read_printed=read_printed,
    )
)
