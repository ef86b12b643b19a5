"""VQAv2 (arXiv 1612.00837), test-dev: scored by the challenge's server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import register
from .llava import Converter, LlavaBenchmark, answer_cleaner, read_answers, read_questions

#: The whole test split, of which test-dev is a part.
TEST = "llava_vqav2_mscoco_test2015.jsonl"


def submission(args: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """[{question_id, answer}] for the whole test split: empty where nothing was asked."""
    answers = read_answers(args.dir / "answers" / args.split / args.ckpt / "merge.jsonl")
    texts, clean = {entry["question_id"]: entry["text"] for entry in answers}, answer_cleaner()
    keys = [question["question_id"] for question in read_questions(args.dir / TEST)]
    made = [{"question_id": key, "answer": clean(texts[key]) if key in texts else ""} for key in keys]
    return args.dir / "answers_upload" / args.split / f"{args.ckpt}.json", made


register(
    LlavaBenchmark(
        name="vqav2",
        title="VQAv2",
        headline="accuracy",
        questions="vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        images="vqav2/test2015",
        needs=f"vqav2/{TEST}",
        converter=Converter("vqav2_for_submission", {"--dir": Path, "--split": str, "--ckpt": str}, submission),
        paper=(79.1, 73.6, 78.8),
        average="VQA average",
    )
)
