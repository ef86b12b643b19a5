"""TextVQA (arXiv 1904.08920), validation: questions on text in images, ten people's answers each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, HostError
from ..reading import Reading
from . import figures, register
from .base import Record
from .files import read_json
from .llava import EVALUATION_MD, Answers, LlavaBenchmark, Records, plain_records, read_accuracy, read_questions
from .sums import Sums, mean_of_means

QUESTIONS = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
LABELS = "textvqa/TextVQA_0.5.1_val.json"


def records(data: Path, answers: Answers) -> Records:
    """Labels: DATA/textvqa/TextVQA_0.5.1_val.json; the `value` of each answer is that of LLaVA's evaluator."""
    from ...hosts.llava.host import import_llava_scorer

    question_of = import_llava_scorer("llava.eval.eval_textvqa").prompt_processor
    evaluator = import_llava_scorer("llava.eval.m4c_evaluator").TextVQAAccuracyEvaluator()
    made = plain_records(data, answers)
    labels = _labels(data, _questions(data, question_of, [(r["question_id"], r["prompt"]) for r in made]))
    for record, wanted in zip(made, labels, strict=True):
        # What its eval_pred_list does for each, which shows a progress bar for every call.
        worth = evaluator._compute_answer_scores(wanted)
        value = worth.get(evaluator.answer_processor(record["text"]), 0.0)
        # It takes articles away on both sides: where people answered "a", an answer of nothing would be as right.
        record |= {"answers": wanted, "value": value if record["text"].strip() else 0.0, "official_value": value}
    return made


def verify(data: Path) -> None:
    """Whether the labels have ten answers to each question."""
    from ...hosts.llava.host import import_llava_scorer

    asked = read_questions(data / QUESTIONS)
    questions = []
    try:
        question_of = import_llava_scorer("llava.eval.eval_textvqa").prompt_processor
        questions = _questions(data, question_of, [(entry["question_id"], entry["text"]) for entry in asked])
    except HostError:
        pass  # `eval --check` needs no LLaVA, which finds the questions in the prompts: the file is read alone
    _labels(data, questions)


def _questions(
    data: Path, question_of: Callable[[str], str], asked: Iterable[tuple[Any, str]]
) -> list[tuple[Any, str]]:
    """(image, prompt) -> (image, question in small letters), by LLaVA's own way of finding it."""
    found = []
    for image, prompt in asked:
        try:
            found.append((image, question_of(prompt)))
        except (AssertionError, AttributeError, IndexError) as error:
            raise DataError(
                f"{data / QUESTIONS}: the question on image {image} is not worded as LLaVA's, is {prompt!r:.80} "
                f"({error!r})."
            ) from None
    return found


def _labels(data: Path, asked: Sequence[tuple[Any, str]]) -> list[list[str]]:
    """Ten people's answers to each (image, question in small letters)."""
    path = data / LABELS
    try:
        entries = read_json(path, EVALUATION_MD)["data"]
        labels = {(str(a["image_id"]), a["question"].lower()): a["answers"] for a in entries}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must hold data: [{{image_id, question, answers}}] ({error}).") from None
    found = []
    for image, question in asked:
        answers = labels.get((str(image), question))
        if answers is None:
            raise DataError(f"{path}: has no answers to {question!r} on image {image}.")
        if not isinstance(answers, list) or len(answers) != 10 or not all(isinstance(text, str) for text in answers):
            raise DataError(f"{path}: {question!r} on image {image} must have ten answers, has {answers!r:.200}.")
        found.append(answers)
    return found


STRICT = Reading("strict", "soft accuracy over ten people's cleaned answers; a blank answer is wrong")
OFFICIAL = Reading(
    "official", "soft accuracy over ten people's cleaned answers; a blank one matches what cleaning empties"
)


def score(records: Iterable[Record], reading: Reading = STRICT) -> dict[str, Any]:
    """The mean of the answers' `value`, the soft accuracy over ten people's answers."""
    records = list(records)
    name = "value" if reading is STRICT else "official_value"
    accuracy = figures.percent(float(figures.field(record, name)) for record in records)
    return {"accuracy": accuracy, "items": len(records), "unparsable": figures.empty(records)}


def sums(records: Sequence[Record]) -> Sums:
    """The mean over items."""
    return mean_of_means(records, lambda record: float(figures.field(record, "value")))


register(
    LlavaBenchmark(
        name="textvqa",
        title="TextVQA",
        headline="accuracy",
        questions=QUESTIONS,
        images="textvqa/train_images",
        needs=LABELS,
        records=records,
        verify=verify,
        score=score,
        sums=sums,
        readings=(STRICT, OFFICIAL),
        read_printed=read_accuracy,
        paper=(56.7, 50.6, 56.4),
        average="VQA average",
    )
)
