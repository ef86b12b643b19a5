"""MME (arXiv 2306.13394): two yes/no questions an image, fourteen tasks of perception and cognition."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ..reading import yes_no_other
from . import figures, register
from .base import Record
from .files import read_text
from .llava import Answers, LlavaBenchmark, Records, plain_records, read_questions
from .sums import Sums, numbered

QUESTIONS = "MME/llava_mme.jsonl"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ENDINGS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def records(data: Path, answers: Answers) -> Records:
    """Labels: DATA/MME/MME_Benchmark_release_version/TASK[/questions_answers_YN]/IMAGE.txt, question, tab, Yes or No a
    line. LLaVA's question ids are TASK/IMAGE.jpg."""
    made = plain_records(data, answers)
    found = _labels(data, [(record["question_id"], record["prompt"]) for record in made])
    return [{**record, **label} for record, label in zip(made, found, strict=True)] if found else made


def verify(data: Path) -> None:
    """Whether the labels, where they lie on this machine, have an answer to each question."""
    _labels(data, [(entry["question_id"], entry["text"]) for entry in read_questions(data / QUESTIONS)])


def _labels(data: Path, asked: Sequence[tuple[Any, str]]) -> list[dict[str, str]]:
    """category, image and label of each (question id, text); none where the labels are not on this machine."""
    root = data / "MME" / "MME_Benchmark_release_version"
    if not any(root.glob("*/*.txt")) and not any(root.glob("*/questions_answers_YN/*.txt")):
        return []
    labels: dict[Path, dict[str, str]] = {}
    found = []
    for key, text in asked:
        task, slash, file = str(key).partition("/")
        if not slash:
            raise DataError(f"{data / QUESTIONS}: the question id {key!r} is not TASK/IMAGE.jpg, as MME's are.")
        stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        path = root / task / "questions_answers_YN" / f"{stem}.txt"
        path = path if path.is_file() else root / task / f"{stem}.txt"
        if path not in labels:
            labels[path] = _read_labels(path, data / QUESTIONS)
        question = _question(text)
        if question not in labels[path]:
            raise DataError(f"{path}: has no question {question!r}, which {data / QUESTIONS} asks.")
        found.append({"category": task, "image": stem, "label": labels[path][question].lower()})
    return found


def _read_labels(path: Path, questions: Path) -> dict[str, str]:
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it has the labels of an image of MME ({questions}).") from None
    labels = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question, tab, label = line.rstrip().rpartition("\t")
        if not tab or label.lower() not in ("yes", "no"):
            raise DataError(f"{path}, line {number}: must be a question, a tab, and Yes or No.")
        labels[_question(question)] = label
    return labels


def _question(text: str) -> str:
    """A question without what it is asked with, which MME and LLaVA word differently."""
    for ending in _ENDINGS:
        text = text.replace(ending, " ")
    return re.sub(r"\s+", " ", text).strip()


def score(records: Iterable[Record]) -> dict[str, Any]:
    """Of each task the accuracy over questions plus the accuracy over images, both of whose questions have to be right
    (200 at most); `perception` and `cognition` are sums over tasks, `percent` is what perception has of its most;
    `missing` names tasks of which there is nothing. An image is known by its task and `image`."""
    records = list(records)
    tasks = figures.grouped(records, "category", (*PERCEPTION, *COGNITION))
    scores: dict[str, float] = {}
    for task, items in tasks.items():
        images = by_image(items)
        right, questions, both = (sum(image[place] for image in images) for place in (1, 2, 3))
        scores[task] = 100 * right / questions + 100 * both / len(images)
    perception = [value for task, value in scores.items() if task in PERCEPTION]
    cognition = [value for task, value in scores.items() if task in COGNITION]
    return {
        "percent": sum(perception) / (2 * len(perception)) if perception else None,
        "perception": sum(perception) if perception else None,
        "cognition": sum(cognition) if cognition else None,
        **scores,
        **figures.missing(scores, PERCEPTION),
        "items": len(records),
        "unparsable": figures.unparsable(records, yes_no_other),
    }


def by_image(records: Iterable[Record]) -> list[tuple[str, int, int, bool]]:
    """Images as (task, questions answered rightly, questions, whether all are)."""
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for record in records:
        right = yes_no_other(figures.answer(record)) is figures.is_yes(record)
        images[figures.field(record, "category"), figures.field(record, "image")].append(right)
    return [(task, sum(values), len(values), all(values)) for (task, _), values in images.items()]


def sums(records: Sequence[Record]) -> Sums:
    """`percent` over images, not questions: both of an image's belong together."""
    images = [image for image in by_image(records) if image[0] in PERCEPTION]
    columns = np.array([[right, questions, both, 1] for _, right, questions, both in images], dtype=float)

    def value(totals: np.ndarray) -> np.ndarray:
        right, questions, both, count = (totals[..., place] for place in range(4))
        return 50 * (right / questions + both / count).mean(axis=-1)

    return Sums(numbered([task for task, *_ in images]), columns, value)


def read_printed(text: str) -> dict[str, float]:
    """calculation.py prints a `total score` for perception (of 2,000) and one for cognition (of 800). `percent` is the
    share of perception's, as which the paper's figures (61 to 78) can only be read."""
    names = ("perception", "cognition")
    found = dict(zip(names, map(float, re.findall(r"total score: ([\d.]+)", text)), strict=False))
    if "perception" in found:
        found["percent"] = found["perception"] / 20
    return found


register(
    LlavaBenchmark(
        name="mme",
        title="MME",
        headline="percent",
        questions=QUESTIONS,
        images="MME/MME_Benchmark_release_version",
        labels="MME/MME_Benchmark_release_version/TASK/*.txt",
        records=records,
        verify=verify,
        score=score,
        sums=sums,
        read_printed=read_printed,
        paper=(67.2, 61.2, 70.1),
        average="VQA average",
    )
)
