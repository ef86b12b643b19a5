"""VizWiz (arXiv 1802.08218), test: scored by the challenge's server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import RecordsError
from . import register
from .llava import Converter, LlavaBenchmark, answer_cleaner, read_answers, read_questions


def submission(args: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """[{image, answer}] in the order of the questions.

    Raises:
        RecordsError: when a question has no answer.
    """
    answers, questions = args.result_file, args.annotation_file
    texts = {entry["question_id"]: entry["text"] for entry in read_answers(answers)}
    made, clean = [], answer_cleaner()
    for question in read_questions(questions):
        if question["question_id"] not in texts:
            raise RecordsError(f"{answers}: has no answer to question {question['question_id']!r} of {questions}.")
        made.append({"image": question["image"], "answer": clean(texts[question["question_id"]])})
    return args.result_upload_file, made


register(
    LlavaBenchmark(
        name="vizwiz",
        title="VizWiz",
        headline="accuracy",
        questions="vizwiz/llava_test.jsonl",
        images="vizwiz/test",
        converter=Converter(
            "vizwiz_for_submission",
            {"--annotation-file": Path, "--result-file": Path, "--result-upload-file": Path},
            submission,
        ),
        paper=(48.0, 31.2, 42.5),
        average="VQA average",
    )
)
