"""The miniature's held-out questions in the layout of LLaVA's own six benchmarks (its docs/Evaluation.md), for
`scripts/eval/{pope,textvqa,gqa,mme,vizwiz,vqav2}.sh`."""

from __future__ import annotations

import json
import re
from pathlib import Path

#: Real files end with "\nAnswer the question using a single word or phrase.", which these models have never read;
#: LLaVA's eval_textvqa wants two lines.
_SECOND_LINE = "\n"
RELATION = re.compile(r"Is the (\S+ \S+) (.+) the (\S+ \S+)\?")
_POPE = ("adversarial", "popular", "random")


def write_llava_benchmarks(output: Path, images: Path, relations: list[dict], questions: list[dict]) -> dict[str, int]:
    """Write OUTPUT/{pope,textvqa,gqa,MME,vizwiz,vqav2}.

    Args:
        images: folder that the questions' image paths are relative to.
        relations: yes/no questions; questions: open ones, each with image, text and answer.

    Returns:
        How many questions each has.
    """
    return {
        "pope": _pope(output / "pope", images, relations),
        "textvqa": _textvqa(output / "textvqa", images, questions),
        "gqa": _gqa(output / "gqa", images, questions),
        "mme": _mme(output / "MME", images, relations),
        "vizwiz": _plain(output / "vizwiz" / "llava_test.jsonl", questions, output / "vizwiz/test", images),
        "vqav2": _vqav2(output / "vqav2", images, questions),
    }


def _pope(folder: Path, images: Path, relations: list[dict]) -> int:
    """Three parts, each with its labels in the order of its questions. Couples, one yes and one no, stay together."""
    asked = []
    for number, question in enumerate(relations):
        category = _POPE[number // 2 % 3]
        asked.append({"question_id": number, **_asked(question), "category": category})
    for category in _POPE:
        labels = [
            {"label": question["answer"].lower()}
            for entry, question in zip(asked, relations, strict=True)
            if entry["category"] == category
        ]
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    link(folder / "val2014", images)
    return write_lines(folder / "llava_pope_test.jsonl", asked)


def _textvqa(folder: Path, images: Path, questions: list[dict]) -> int:
    asked = [{"question_id": f"image{n}", **_asked(question, _SECOND_LINE)} for n, question in enumerate(questions)]
    annotations = [
        {"image_id": entry["question_id"], "question": question["text"], "answers": [question["answer"]] * 10}
        for entry, question in zip(asked, questions, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations}), encoding="utf-8")
    link(folder / "train_images", images)
    return write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", asked)


def _plain(path: Path, questions: list[dict], place: Path, images: Path) -> int:
    link(place, images)
    return write_lines(path, [{"question_id": n, **_asked(question)} for n, question in enumerate(questions)])


def _gqa(folder: Path, images: Path, questions: list[dict]) -> int:
    labels = {str(number): {"answer": question["answer"].lower()} for number, question in enumerate(questions)}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "testdev_balanced_questions.json").write_text(json.dumps(labels), encoding="utf-8")
    return _plain(folder / "llava_gqa_testdev_balanced.jsonl", questions, folder / "data/images", images)


def _mme(folder: Path, images: Path, relations: list[dict]) -> int:
    """Two questions an image, of which one is to be answered yes: the second asks for the objects the other way."""
    root = folder / "MME_Benchmark_release_version"
    link(root / "position" / "images", images)
    asked = []
    for number, question in enumerate(relations):
        turned = RELATION.fullmatch(question["text"])
        if turned is None:
            raise ValueError(f"{question['text']!r} is no question on a relation.")
        first, relation, second = turned.groups()
        pair = [
            (question["text"], question["answer"]),
            (f"Is the {second} {relation} the {first}?", "No" if question["answer"] == "Yes" else "Yes"),
        ]
        labels = root / "position" / "questions_answers_YN" / f"{number:04d}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("".join(f"{text} Please answer yes or no.\t{label}\n" for text, label in pair), "utf-8")
        image = f"position/images/{question['image']}"
        asked += [{"question_id": f"position/{number:04d}.png", "image": image, "text": text} for text, _ in pair]
    return write_lines(folder / "llava_mme.jsonl", asked)


def _vqav2(folder: Path, images: Path, questions: list[dict]) -> int:
    """The dev split is a part of the test split, for all of which the server wants an answer."""
    link(folder / "test2015", images)
    whole = [{"question_id": n, **_asked(question)} for n, question in enumerate(questions)]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", whole)
    return write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", whole[::2])


def _asked(question: dict, more: str = "") -> dict[str, str]:
    return {"image": question["image"], "text": question["text"] + more}


def write_lines(path: Path, entries: list[dict]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return len(entries)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve(), target_is_directory=True)
