"""What LLaVA's own benchmarks share: the layout of its docs/Evaluation.md, its questions and answers, and the files
that official scorers and servers take. scripts/eval/NAME.sh asks them through LLaVA's modules."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MissingData, RecordsError
from ...hosts.files import half_a_character, parse_json
from .base import Benchmark
from .files import read_text

Answers = list[dict[str, Any]]
Records = list[dict[str, Any]]

EVALUATION_MD = "see LLaVA's docs/Evaluation.md."


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers
# ---------------------------------------------------------------------------------------------------------------------
def read_questions(path: Path, images: Path | None = None) -> list[dict[str, Any]]:
    """LLaVA's questions, a JSON object a line with question_id, image and text; with a folder of images, whether each
    one's image is there.

    Raises:
        RecordsError: for a line that is none, or whose text or image will not do, with its number.
    """
    lines = _text(path).split("\n")
    questions = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        entry = _entry(path, number, line, ("question_id", "image", "text"))
        text = entry["text"]
        if not isinstance(text, str) or "<image>" in text or half_a_character(text):
            raise RecordsError(
                f"{path}, line {number}: its text must be a question without <image> and without half a character (a "
                f"lone surrogate), is {text!r}."
            )
        if images is not None and not os.path.isfile(images / str(entry["image"])):
            raise RecordsError(f"{path}, line {number}: its image {images / str(entry['image'])} is missing.")
        questions.append(entry)
    if not questions:
        raise RecordsError(f"{path}: holds no questions.")
    return questions


def read_answers(path: Path) -> Answers:
    """LLaVA's answers; a line that a kill left unfinished does not count.

    Raises:
        RecordsError: for a line that is none, or whose prompt or text is no text, with its number.
    """
    answers = []
    for number, line in enumerate(_text(path).split("\n")[:-1], start=1):
        entry = _entry(path, number, line, ("question_id", "prompt", "text"))
        for name in ("prompt", "text"):
            if not isinstance(entry[name], str):
                raise RecordsError(f"{path}, line {number}: {name} must be a text, is {entry[name]!r:.60}.")
        answers.append(entry)
    return answers


def _text(path: Path) -> str:
    try:
        return read_text(path, "replace")
    except OSError as error:
        raise RecordsError(f"{path}: {error.strerror}.") from None


def _entry(path: Path, number: int, line: str, fields: Sequence[str]) -> dict[str, Any]:
    entry = parse_json(line, f"{path}, line {number}", RecordsError)
    if not isinstance(entry, dict):
        raise RecordsError(f"{path}, line {number}: no JSON object, is {entry!r:.60}.")
    missing = [name for name in fields if name not in entry]
    if missing:
        raise RecordsError(f"{path}, line {number}: has no {missing[0]!r}, only {', '.join(entry)}.")
    if not isinstance(entry["question_id"], str | int):
        raise RecordsError(
            f"{path}, line {number}: question_id must be a text or a number, is {entry['question_id']!r:.60}."
        )
    return entry


def plain_records(data: Path, answers: Answers) -> Records:
    """A record an answer, without labels: they are on a server."""
    names = ("question_id", "prompt", "text")
    return [{"id": str(number), **{name: entry[name] for name in names}} for number, entry in enumerate(answers)]


def read_accuracy(text: str) -> dict[str, float]:
    """The last `Accuracy: 61.3%`, as eval_textvqa and GQA's eval.py print it."""
    found = re.findall(r"Accuracy: ([\d.]+)%", text)
    return {"accuracy": float(found[-1])} if found else {}


# ---------------------------------------------------------------------------------------------------------------------
# Files for scorers and servers
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Converter:
    """Stands for one of LLaVA's scripts/convert_COMMAND.py, which its package on the registry leaves out.

    Attributes:
        command: the script's name between convert_ and .py.
        flags: the script's flags, all of them required, and their types.
        convert: parsed flags -> the file to write, and what it holds.
    """

    command: str
    flags: Mapping[str, type]
    convert: Callable[[argparse.Namespace], tuple[Path, list[dict[str, Any]]]]


def answer_cleaner() -> Callable[[str], str]:
    """LLaVA's: numbers in digits, no articles, no punctuation, as the servers compare."""
    from ...hosts.llava.host import import_llava_scorer

    return import_llava_scorer("llava.eval.m4c_evaluator").EvalAIAnswerProcessor()


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class LlavaBenchmark(Benchmark):
    """A benchmark that scripts/eval/NAME.sh asks through LLaVA's modules. All paths lie below the data root.

    Attributes:
        questions: LLaVA's file; without it the benchmark is left out of `all`.
        images: the folder of its images.
        needs: what its scorer or converter reads besides.
        labels: where the labels have to lie to be counted with.
        records: (data root, LLaVA's answers in the order of the questions) -> a record each, with its label where the
            labels lie on this machine.
        read_printed: what LLaVA's or the official scorer prints -> figures; empty while there is no score.
        verify: (data root) looks at labels and the like before anything is asked; raises DataError.
        converter: writes the file for its scorer or server.
    """

    questions: str
    images: str
    needs: str = ""
    labels: str = ""
    records: Callable[[Path, Answers], Records] = plain_records
    read_printed: Callable[[str], dict[str, float]] = lambda text: {}
    verify: Callable[[Path], None] = lambda data: None
    converter: Converter | None = None

    def check(self, data: Path) -> None:
        """Read the questions and look for their images.

        Raises:
            MissingData: when its files are not there at all.
            RecordsError: for a wrong question or a missing image, with file and line.
            DataError: for labels of another version.
        """
        for path in (data / self.questions, data / self.images, data / self.needs):
            if not path.exists():
                raise MissingData(f"{path} is missing: see LLaVA's docs/Evaluation.md (its eval.zip goes to {data}).")
        read_questions(data / self.questions, data / self.images)
        self.verify(data)
