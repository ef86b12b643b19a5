"""A record an item from LLaVA's answers: the answer beside its label, where the labels lie on this machine.

Each reader takes the folder of all benchmarks (--data-root) and LLaVA's answers in the order of the questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from .formats import read_json
from .llava_answers import read_questions

Answers = list[dict[str, Any]]
Records = list[dict[str, Any]]

EVALUATION_MD = "see LLaVA's docs/Evaluation.md."
_MME_ENDINGS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def pope(data: Path, answers: Answers) -> Records:
    """DATA/pope: llava_pope_test.jsonl has the categories, coco/coco_pope_CATEGORY.json the labels, one a line, in the
    order of the category's questions (as LLaVA's eval_pope takes them)."""
    categories = [entry.get("category") for entry in read_questions(data / "pope" / "llava_pope_test.jsonl")]
    labels: dict[str, list[str]] = {}
    for category in dict.fromkeys(categories):
        path = data / "pope" / "coco" / f"coco_pope_{category}.json"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            labels[category] = [json.loads(line)["label"] for line in lines]
        except FileNotFoundError:
            raise DataError(f"{path} is missing: it has the labels of the category {category!r}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: must hold one {{label}} a line ({error}).") from None
        if len(lines) != categories.count(category):
            raise DataError(f"{path}: {len(lines)} labels for {categories.count(category)} questions.")
    places = {category: iter(values) for category, values in labels.items()}
    return [
        {**record, "category": category, "label": next(places[category])}
        for record, category in zip(plain(data, answers), categories, strict=True)
    ]


def gqa(data: Path, answers: Answers) -> Records:
    """DATA/gqa/data/testdev_balanced_questions.json, or in questions1.2 there: {question id: {answer, …}}."""
    folder = data / "gqa" / "data"
    name = "testdev_balanced_questions.json"
    path = next((path for path in (folder / name, folder / "questions1.2" / name) if path.is_file()), None)
    if path is None:
        return plain(data, answers)
    questions = read_json(path, EVALUATION_MD)
    records = plain(data, answers)
    for record in records:
        try:
            record["label"] = questions[str(record["question_id"])]["answer"]
        except (KeyError, TypeError):
            raise DataError(f"{path}: has no answer to question {record['question_id']!r}.") from None
    return records


def textvqa(data: Path, answers: Answers) -> Records:
    """DATA/textvqa/TextVQA_0.5.1_val.json; the `value` of each answer is that of LLaVA's evaluator."""
    from llava.eval.eval_textvqa import prompt_processor
    from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator

    path = data / "textvqa" / "TextVQA_0.5.1_val.json"
    try:
        wanted = {
            (str(a["image_id"]), a["question"].lower()): a["answers"] for a in read_json(path, EVALUATION_MD)["data"]
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: must hold data: [{{image_id, question, answers}}] ({error}).") from None
    evaluator = TextVQAAccuracyEvaluator()
    records = plain(data, answers)
    for record in records:
        key = (str(record["question_id"]), prompt_processor(record["prompt"]))
        if key not in wanted:
            raise DataError(f"{path}: has no answers to {key[1]!r} on image {key[0]}.")
        # What its eval_pred_list does for each, which shows a progress bar for every call.
        worth = evaluator._compute_answer_scores(wanted[key])
        clean = evaluator.answer_processor(record["text"])
        # It takes articles away: where people answered "a", nothing would be as right as they.
        value = worth.get(clean, 0.0) if clean else 0.0
        record |= {"answers": wanted[key], "value": value}
    return records


def mme(data: Path, answers: Answers) -> Records:
    """DATA/MME/MME_Benchmark_release_version/TASK[/questions_answers_YN]/IMAGE.txt: question, tab, Yes or No a line.
    LLaVA's question ids are TASK/IMAGE.jpg."""
    root = data / "MME" / "MME_Benchmark_release_version"
    if not any(root.glob("*/*.txt")) and not any(root.glob("*/questions_answers_YN/*.txt")):
        return plain(data, answers)
    labels: dict[Path, dict[str, str]] = {}
    records = plain(data, answers)
    for record in records:
        task, *_, file = str(record["question_id"]).split("/")
        stem = file.rsplit(".", 1)[0]
        path = root / task / "questions_answers_YN" / f"{stem}.txt"
        path = path if path.is_file() else root / task / f"{stem}.txt"
        if path not in labels:
            labels[path] = _mme_labels(path)
        question = _mme_question(record["prompt"])
        if question not in labels[path]:
            raise DataError(f"{path}: has no question {question!r}.")
        record |= {"category": task, "image": stem, "label": labels[path][question].lower()}
    return records


def _mme_labels(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it has the labels of an image of MME.") from None
    labels = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question, tab, label = line.rstrip().rpartition("\t")
        if not tab or label.lower() not in ("yes", "no"):
            raise DataError(f"{path}, line {number}: must be a question, a tab, and Yes or No.")
        labels[_mme_question(question)] = label
    return labels


def _mme_question(text: str) -> str:
    """A question without what it is asked with, which MME and LLaVA word differently."""
    for ending in _MME_ENDINGS:
        text = text.replace(ending, " ")
    return re.sub(r"\s+", " ", text).strip()


def plain(data: Path, answers: Answers) -> Records:
    """Without labels: they are on a server."""
    names = ("question_id", "prompt", "text")
    return [{"id": str(number), **{name: entry[name] for name in names}} for number, entry in enumerate(answers)]


READERS: dict[str, Callable[[Path, Answers], Records]] = {
    "vqav2": plain,
    "gqa": gqa,
    "vizwiz": plain,
    "textvqa": textvqa,
    "mme": mme,
    "pope": pope,
}
