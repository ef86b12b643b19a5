"""GQA (arXiv 1902.09506), testdev-balanced: open questions, most of them on relations and attributes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..reading import short
from . import figures, register
from .base import Record
from .files import read_json
from .llava import (
    EVALUATION_MD,
    Answers,
    Converter,
    LlavaBenchmark,
    Records,
    plain_records,
    read_accuracy,
    read_answers,
    read_questions,
)
from .sums import Sums, mean_of_means

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
LABELS = "testdev_balanced_questions.json"


def records(data: Path, answers: Answers) -> Records:
    """Labels: DATA/gqa/data/testdev_balanced_questions.json, or in questions1.2 there: {question id: {answer, …}}."""
    made = plain_records(data, answers)
    labels = _labels(data, [record["question_id"] for record in made])
    return [{**record, "label": label} for record, label in zip(made, labels, strict=True)] if labels else made


def verify(data: Path) -> None:
    """Whether the labels, where they lie on this machine, have an answer to each question."""
    _labels(data, [entry["question_id"] for entry in read_questions(data / QUESTIONS)])


def _labels(data: Path, ids: Sequence[Any]) -> list[str]:
    """The answers to some questions; none where the labels are not on this machine."""
    folder = data / "gqa" / "data"
    path = next((path for path in (folder / LABELS, folder / "questions1.2" / LABELS) if path.is_file()), None)
    if path is None:
        return []
    questions = read_json(path, EVALUATION_MD)
    labels = []
    for key in ids:
        entry = questions.get(str(key)) if isinstance(questions, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
            raise DataError(f"{path}: has no answer to question {key!r}.")
        labels.append(entry["answer"])
    return labels


def score(records: Iterable[Record]) -> dict[str, Any]:
    """The share of answers that are the label, both in the form of `reading.short`."""
    records = list(records)
    accuracy = figures.percent(map(right, records))
    return {"accuracy": accuracy, "items": len(records), "unparsable": figures.empty(records)}


def right(record: Record) -> float:
    """Whether an answer is the label."""
    return float(short(figures.answer(record)) == short(figures.field(record, "label")))


def sums(records: Sequence[Record]) -> Sums:
    """The mean over items."""
    return mean_of_means(records, right)


def predictions(args: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """[{questionId, prediction}], as GQA's eval.py reads it."""
    answers = read_answers(args.src)
    return args.dst, [{"questionId": entry["question_id"], "prediction": short(entry["text"])} for entry in answers]


register(
    LlavaBenchmark(
        name="gqa",
        title="GQA",
        headline="accuracy",
        questions=QUESTIONS,
        images="gqa/data/images",
        labels=f"gqa/data/{LABELS}",
        records=records,
        verify=verify,
        score=score,
        sums=sums,
        read_printed=read_accuracy,
        converter=Converter("gqa_for_eval", {"--src": Path, "--dst": Path}, predictions),
        paper=(62.1, 57.9, 62.2),
        average="VQA average",
    )
)
