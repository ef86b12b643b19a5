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
)
from .sums import Sums, mean_of_means

LABELS = "testdev_balanced_questions.json"


def records(data: Path, answers: Answers) -> Records:
    """Labels: DATA/gqa/data/testdev_balanced_questions.json, or in questions1.2 there: {question id: {answer, …}}."""
    folder = data / "gqa" / "data"
    path = next((path for path in (folder / LABELS, folder / "questions1.2" / LABELS) if path.is_file()), None)
    made = plain_records(data, answers)
    if path is None:
        return made
    questions = read_json(path, EVALUATION_MD)
    for record in made:
        try:
            record["label"] = questions[str(record["question_id"])]["answer"]
        except (KeyError, TypeError):
            raise DataError(f"{path}: has no answer to question {record['question_id']!r}.") from None
    return made


def score(records: Iterable[Record]) -> dict[str, Any]:
    """The share of answers that are the label, both in the form of `reading.short`."""
    records = list(records)
    accuracy = figures.percent(map(right, records))
    return {"accuracy": accuracy, "items": len(records), "unparsable": figures.empty(records)}


def right(record: Record) -> float:
    """Whether an answer is the label."""
    return float(short(figures.field(record, "text")) == short(figures.field(record, "label")))


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
        questions="gqa/llava_gqa_testdev_balanced.jsonl",
        images="gqa/data/images",
        labels=f"gqa/data/{LABELS}",
        records=records,
        score=score,
        sums=sums,
        read_printed=read_accuracy,
        converter=Converter("gqa_for_eval", {"--src": Path, "--dst": Path}, predictions),
        paper=(62.1, 57.9, 62.2),
        average="VQA average",
    )
)
