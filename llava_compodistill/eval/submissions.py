"""The files that GQA's scorer and the servers of VQAv2 and VizWiz take, from LLaVA's answers.

LLaVA's repository has scripts for this (scripts/convert_*.py), its package on the registry leaves them out. Where they
are missing scripts/eval/*.sh call these, which take the same flags and write the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RecordsError
from .llava_answers import read_answers, read_questions
from .reading import short


def gqa(answers: Path) -> list[dict[str, Any]]:
    """[{questionId, prediction}], as GQA's eval.py reads it."""
    return [
        {"questionId": entry["question_id"], "prediction": short(entry["text"])} for entry in read_answers(answers)
    ]


def vizwiz(answers: Path, questions: Path) -> list[dict[str, Any]]:
    """[{image, answer}] in the order of the questions.

    Raises:
        RecordsError: when a question has no answer.
    """
    texts = _texts(answers)
    made, clean = [], _cleaner()
    for question in read_questions(questions):
        if question["question_id"] not in texts:
            raise RecordsError(f"{answers}: has no answer to question {question['question_id']!r} of {questions}.")
        made.append({"image": question["image"], "answer": clean(texts[question["question_id"]])})
    return made


def vqav2(answers: Path, questions: Path) -> list[dict[str, Any]]:
    """[{question_id, answer}] for the whole test split, of which test-dev is a part: empty where nothing was asked."""
    texts, clean = _texts(answers), _cleaner()
    keys = [question["question_id"] for question in read_questions(questions)]
    return [{"question_id": key, "answer": clean(texts[key]) if key in texts else ""} for key in keys]


def _texts(answers: Path) -> dict[Any, str]:
    return {entry["question_id"]: entry["text"] for entry in read_answers(answers)}


def _cleaner() -> Any:
    """LLaVA's: numbers in digits, no articles, no punctuation, as the servers compare."""
    from llava.eval.m4c_evaluator import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.submissions", description=__doc__)
    which = parser.add_subparsers(dest="which", required=True)
    of_gqa = which.add_parser("gqa_for_eval")
    of_gqa.add_argument("--src", type=Path, required=True)
    of_gqa.add_argument("--dst", type=Path, required=True)
    of_vizwiz = which.add_parser("vizwiz_for_submission")
    of_vizwiz.add_argument("--annotation-file", type=Path, required=True)
    of_vizwiz.add_argument("--result-file", type=Path, required=True)
    of_vizwiz.add_argument("--result-upload-file", type=Path, required=True)
    of_vqav2 = which.add_parser("vqav2_for_submission")
    of_vqav2.add_argument("--dir", type=Path, required=True)
    of_vqav2.add_argument("--split", required=True)
    of_vqav2.add_argument("--ckpt", required=True)
    args = parser.parse_args(argv)
    try:
        if args.which == "gqa_for_eval":
            path, made = args.dst, gqa(args.src)
        elif args.which == "vizwiz_for_submission":
            path, made = args.result_upload_file, vizwiz(args.result_file, args.annotation_file)
        else:
            path = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
            answers = args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
            made = vqav2(answers, args.dir / "llava_vqav2_mscoco_test2015.jsonl")
    except RecordsError as error:
        print(error, file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
