"""The miniature's held-out sets in the benchmarks' own formats, so that every loader and scorer has something to read.

What the world has is given to the benchmark that asks for such a thing: its compositional couples to SugarCrepe, SADE,
BiVLC and Winoground, its yes/no questions on relations to R-Bench and Reefknot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from .compositional import KINDS
from .llava_benchmarks import RELATION, link, write_lines, write_llava_benchmarks
from .world import GRID

#: Which type of the world's captions stands for a category of SADE.
_SADE = {"relation": "replace_rel", "attribute": "swap_att", "atomic": "replace_obj", "negate": "add_att"}
_LETTERS = "ABCD"


def write_benchmarks(data: Path, output: Path, split: str = "val") -> dict[str, int]:
    """Write OUTPUT/{sugarcrepe,sade,bivlc,winoground,rbench,reefknot} (rbench with boxes and masks) and LLaVA's six
    from the folder that `write_dataset` filled.

    Returns:
        How many items each benchmark has.

    Raises:
        FileNotFoundError: when DATA is no such folder.
    """
    images = data / "images"
    if not (data / "manifest.json").is_file():
        raise FileNotFoundError(f"{data / 'manifest.json'} is missing: `miniature data` or the quick start writes it.")
    subsets = {
        kind: list(json.loads((data / f"compositional_{split}" / f"{kind}.json").read_text(encoding="utf-8")).values())
        for kind in KINDS
    }
    relations = _read_lines(data / f"relation_{split}.jsonl")
    questions = _read_lines(data / f"recognition_{split}.jsonl")
    counts = {
        "sugarcrepe": _sugarcrepe(output / "sugarcrepe", subsets),
        "sade": _sade(output / "sade", subsets),
        "bivlc": _bivlc(output / "bivlc", subsets),
        "winoground": _winoground(output / "winoground", subsets),
        "rbench": _rbench(output / "rbench", relations),
        **_rbench_instances(output / "rbench", relations, _scenes(data, f"relation_{split}")),
        "reefknot": _reefknot(output / "reefknot", relations, questions, subsets),
    }
    for name in ("sugarcrepe", "sade", "bivlc", "winoground", "rbench", "reefknot"):
        link(output / name / ("VG_100K" if name == "reefknot" else "images"), images)
    return counts | write_llava_benchmarks(output, images, relations, questions)


def _sugarcrepe(folder: Path, subsets: dict[str, list[dict]]) -> int:
    for kind, items in subsets.items():
        _write(folder / f"{kind}.json", json.dumps(dict(enumerate(items)), indent=1))
    return sum(map(len, subsets.values()))


def _couples(items: list[dict]) -> list[tuple[dict, dict]]:
    """Items 2k and 2k + 1 have the same two captions, each true of the other's image."""
    return list(zip(items[::2], items[1::2], strict=True))


def _sade(folder: Path, subsets: dict[str, list[dict]]) -> int:
    entries: list[dict[str, Any]] = []
    for category, kind in _SADE.items():
        for item in subsets[kind]:
            entries.append({"category": category, "image": item["filename"], "positive": item["caption"]})
            entries[-1]["negatives"] = [item["negative_caption"]]
    # Three wrong captions: the false one, and the two of the next couple.
    couples = _couples(subsets["replace_obj"])
    for number, couple in enumerate(couples):
        others = [item["caption"] for item in couples[(number + 1) % len(couples)]]
        for item in couple:
            if item["caption"] not in others:
                entries.append({"category": "content", "image": item["filename"], "positive": item["caption"]})
                entries[-1]["negatives"] = [item["negative_caption"], *others]
    for first, second in _couples(subsets["swap_obj"]):
        images, captions = [first["filename"], second["filename"]], [first["caption"], second["caption"]]
        entries.append({"category": "comprehensive", "images": images, "captions": captions})
    # Two sources, as half of SADE's categories have.
    numbered = [
        {"id": number, "source": f"miniature {number // 2 % 2 + 1}", **entry} for number, entry in enumerate(entries)
    ]
    return write_lines(folder / "sade.jsonl", numbered)


def _bivlc(folder: Path, subsets: dict[str, list[dict]]) -> int:
    entries = []
    for kind, items in subsets.items():
        for first, second in _couples(items):
            change, subtype = kind.split("_")
            entries.append(
                {
                    "image": first["filename"],
                    "caption": first["caption"],
                    "negative_image": second["filename"],
                    "negative_caption": second["caption"],
                    "type": change,
                    "subtype": subtype,
                }
            )
    return write_lines(folder / "bivlc.jsonl", entries)


def _winoground(folder: Path, subsets: dict[str, list[dict]]) -> int:
    entries = []
    for kind in ("swap_obj", "swap_att"):  # the same words in another order, as there
        for first, second in _couples(subsets[kind]):
            entries.append(
                {
                    "id": len(entries),
                    "image_0": first["filename"],
                    "caption_0": first["caption"],
                    "image_1": second["filename"],
                    "caption_1": second["caption"],
                    "collapsed_tag": "Object" if kind == "swap_obj" else "Attribute",
                }
            )
    return write_lines(folder / "examples.jsonl", entries)


def _rbench(folder: Path, relations: list[dict]) -> int:
    entries = [
        {
            "question_id": number,
            "image": question["image"],
            "text": question["text"],
            "label": question["answer"].lower(),
            "qtype": "positive" if question["answer"] == "Yes" else "negative",
        }
        for number, question in enumerate(relations)
    ]
    _write(folder / "image-level_filterd.json", json.dumps(entries, indent=1))
    _lists(folder, "nocaps_image-level_rel_ids", entries)
    return len(entries)


def _lists(folder: Path, name: str, entries: list[dict]) -> None:
    for number in range(1, 6):
        # Couples stay together, so that every list is balanced; each list leaves out another fifth.
        ids = [entry["question_id"] for entry in entries if entry["question_id"] // 2 % 5 != number - 1]
        _write(folder / f"{name}_{number}.json", json.dumps(ids))


def _rbench_instances(folder: Path, relations: list[dict], scenes: dict[str, list[dict]]) -> dict[str, int]:
    """The same questions with the cells of the two objects as boxes and as masks of 3 x 3 pixels."""
    entries = []
    for number, question in enumerate(relations):
        named = RELATION.match(question["text"])
        assert named is not None, question["text"]
        cells = [_cell(scenes[question["image"]], named[group]) for group in (1, 3)]
        boxes = [[col / GRID, row / GRID, (col + 1) / GRID, (row + 1) / GRID] for row, col in cells]
        entries.append(
            {
                "question_id": number,
                "image": question["image"],
                "text": question["text"],
                "label": question["answer"].lower(),
                "subject": named[1],
                "object": named[3],
                "sub_box": boxes[0],
                "obj_box": boxes[1],
            }
        )
        mask = Image.new("L", (GRID, GRID))
        for value, (row, col) in enumerate(cells, start=1):
            mask.putpixel((col, row), value)
        path = folder / "instance_mask" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
    _write(folder / "instance-level_filterd.json", json.dumps(entries, indent=1))
    _lists(folder, "instance-level_ids", entries)
    return {"rbench-box": len(entries), "rbench-mask": len(entries)}


def _cell(objects: list[dict], name: str) -> tuple[int, int]:
    """(row, column) of the object of a scene that a question calls by colour and shape."""
    (found,) = (entry for entry in objects if f"{entry['color']} {entry['shape']}" == name)
    return found["row"], found["col"]


def _scenes(data: Path, stream: str) -> dict[str, list[dict]]:
    """Image -> what is in it."""
    return {entry["image"]: entry["objects"] for entry in _read_lines(data / "scenes" / f"{stream}.jsonl")}


def _reefknot(folder: Path, relations: list[dict], questions: list[dict], subsets: dict[str, list[dict]]) -> int:
    yes_no = [
        {
            "image_id": question["image"],
            "query_prompt": question["text"],
            "label": question["answer"].lower(),
            "type": "YESNO",
            "relation_type": "perception" if question["type"] == "horizontal" else "cognitive",
        }
        for question in relations
    ]
    choices = []
    for number, item in enumerate(subsets["replace_rel"]):
        captions = [item["caption"], item["negative_caption"]]
        place = number % 2
        captions = captions if place == 0 else captions[::-1]
        options = "\n".join(f"{letter}. {caption}" for letter, caption in zip(_LETTERS, captions, strict=False))
        prompt = f"Which caption describes the image?\n{options}\nAnswer with the letter."
        choices.append(
            {
                "image_id": item["filename"],
                "query_prompt": prompt,
                "label": _LETTERS[place],
                "type": "Multichoice",
                "relation_type": "perception",
            }
        )
    open_questions = [
        {
            "image_id": question["image"],
            "query_prompt": question["text"],
            "label": question["answer"],
            "type": "VQA",
            "relation_type": "cognitive",
        }
        for question in questions
    ]
    files = {"YESNO": yes_no, "Multichoice": choices, "VQA": open_questions}
    return sum(write_lines(folder / f"{name}.jsonl", entries) for name, entries in files.items())


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
