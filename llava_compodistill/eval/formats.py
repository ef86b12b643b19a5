"""The benchmarks' local files, in their public layouts, as items; read and checked before any model is loaded.

DATA is the folder given as --data-root. Images are looked for in the first of the named folders that exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingData
from .scorers import SADE, SUGARCREPE

#: At most so many missing images are named.
_NAMED = 3


@dataclass(frozen=True)
class Item:
    """One thing that a benchmark asks.

    Attributes:
        id: unique in its benchmark.
        images: files; one, or two for 2 x 2 benchmarks.
        captions: to be matched with the images; the first belongs to the first image.
        prompt: a question to answer in words, where there are no captions.
        fields: goes into the record as it is: subset, category, label, …
        place: file and line that it comes from, for messages.
    """

    id: str
    images: tuple[str, ...]
    captions: tuple[str, ...] = ()
    prompt: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    def asked(self) -> list[Any]:
        """What `records.fingerprint` takes: the images by name, since folders move."""
        return [self.id, [Path(image).name for image in self.images], self.captions, self.prompt, self.fields]


def sugarcrepe(data: Path) -> list[Item]:
    """DATA/sugarcrepe/{add_att,…}.json: {"0": {filename, caption, negative_caption}, …}; images of COCO val2017."""
    folder = data / "sugarcrepe"
    images = _images("sugarcrepe", folder / "images", folder / "val2017", data / "coco" / "val2017", data / "val2017")
    items = []
    for subset in SUGARCREPE:
        path = folder / f"{subset}.json"
        for key, entry in _object(path, "sugarcrepe").items():
            place = f"{path}, item {key}"
            items.append(
                Item(
                    f"{subset}-{key}",
                    (str(images / _text(entry, "filename", place)),),
                    (_text(entry, "caption", place), _text(entry, "negative_caption", place)),
                    fields={"subset": subset},
                    place=place,
                )
            )
    return _with_images(items, "sugarcrepe")


def sade(data: Path) -> list[Item]:
    """DATA/sade/sade.jsonl: {id, category, source, image, positive, negatives[]}; for `comprehensive` {id, category,
    source, images[2], captions[2]}; images in DATA/sade/images. (The public files' own keys differ by source; this is
    the form to convert them to.)"""
    folder = data / "sade"
    images = _images("sade", folder / "images", folder)
    items = []
    for place, entry in _lines(folder / "sade.jsonl", "sade"):
        category = _text(entry, "category", place)
        if category not in SADE:
            raise DataError(f"{place}: category {category!r} must be one of {', '.join(SADE)}.")
        if category == "comprehensive":
            names, captions = _texts(entry, "images", place), _texts(entry, "captions", place)
            if len(names) != 2 or len(captions) != 2:
                raise DataError(f"{place}: a comprehensive item has two images and two captions.")
        else:
            names = [_text(entry, "image", place)]
            captions = [_text(entry, "positive", place), *_texts(entry, "negatives", place)]
            if len(captions) < 2:
                raise DataError(f"{place}: negatives is empty.")
        items.append(
            Item(
                str(_value(entry, "id", place)),
                tuple(str(images / name) for name in names),
                tuple(captions),
                fields={"category": category, "source": entry.get("source", "")},
                place=place,
            )
        )
    return _with_images(items, "sade")


def bivlc(data: Path) -> list[Item]:
    """DATA/bivlc/bivlc.jsonl: {image, caption, negative_image, negative_caption, type, subtype}; images in
    DATA/bivlc/images."""
    folder = data / "bivlc"
    images = _images("bivlc", folder / "images", folder)
    items = []
    for number, (place, entry) in enumerate(_lines(folder / "bivlc.jsonl", "bivlc")):
        items.append(
            Item(
                str(entry.get("id", number)),
                tuple(str(images / _text(entry, name, place)) for name in ("image", "negative_image")),
                tuple(_text(entry, name, place) for name in ("caption", "negative_caption")),
                fields={"type": _text(entry, "type", place), "subtype": str(entry.get("subtype", ""))},
                place=place,
            )
        )
    return _with_images(items, "bivlc")


def winoground(data: Path) -> list[Item]:
    """DATA/winoground/examples.jsonl: {id, image_0, image_1, caption_0, caption_1, tag}; images in
    DATA/winoground/images, named as the fields say or with .png behind."""
    folder = data / "winoground"
    images = _images("winoground", folder / "images", folder)

    def file(name: str) -> str:
        return str(images / (name if Path(name).suffix else f"{name}.png"))

    items = []
    for place, entry in _lines(folder / "examples.jsonl", "winoground"):
        items.append(
            Item(
                str(_value(entry, "id", place)),
                tuple(file(_text(entry, name, place)) for name in ("image_0", "image_1")),
                tuple(_text(entry, name, place) for name in ("caption_0", "caption_1")),
                fields={"tag": str(entry.get("collapsed_tag", entry.get("tag", "")))},
                place=place,
            )
        )
    return _with_images(items, "winoground")


def rbench(data: Path) -> list[Item]:
    """DATA/rbench/image-level_filterd.json (the authors' spelling): [{question_id, image, text, label, qtype}], and
    nocaps_image-level_rel_ids_{1..5}.json: the ids of the five balanced lists; images of Open Images v4 validation."""
    folder = data / "rbench"
    images = _images("rbench", folder / "images", folder / "validation", data / "open_images" / "validation")
    path = folder / "image-level_filterd.json"
    entries = read_json(path, HOW_TO_GET["rbench"])
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of questions, is a {type(entries).__name__}.")
    lists: dict[str, list[int]] = {}
    known = {str(_value(entry, "question_id", f"{path}, entry {n}")) for n, entry in enumerate(entries)}
    for number in range(1, 6):
        listed = folder / f"nocaps_image-level_rel_ids_{number}.json"
        ids = dict.fromkeys(map(str, read_json(listed, HOW_TO_GET["rbench"])))
        if not ids.keys() & known:
            raise DataError(f"{listed}: none of its {len(ids)} questions is in {path.name}.")
        # "filterd": a list may name questions that the authors took out again.
        for key in ids.keys() & known:
            lists.setdefault(key, []).append(number)
    items = []
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number}"
        key = str(entry["question_id"])
        if key not in lists:
            continue  # in none of the lists: asked of nobody
        items.append(
            Item(
                key,
                (str(images / _text(entry, "image", place)),),
                prompt=_text(entry, "text", place),
                fields={"label": _label(entry, place), "qtype": str(entry.get("qtype", "")), "lists": lists[key]},
                place=place,
            )
        )
    return _with_images(items, "rbench")


REEFKNOT_FILES = {"yesno": "YESNO.jsonl", "multichoice": "Multichoice.jsonl", "vqa": "VQA.jsonl"}


def reefknot(data: Path) -> list[Item]:
    """DATA/reefknot/{YESNO,Multichoice,VQA}.jsonl: {image_id, query_prompt, label, type, relation_type}; images
    VG_100K/ID.jpg or VG_100K_2/ID.jpg under DATA/reefknot or DATA/vg. Prompts repeat: an item is known by its line."""
    folder = data / "reefknot"
    roots = [root / name for root in (folder, data / "vg") for name in ("VG_100K", "VG_100K_2")]
    roots = [root for root in roots if root.is_dir()]
    if not roots:
        raise MissingData(f"{folder / 'VG_100K'} is missing: {HOW_TO_GET['reefknot']}")
    items = []
    for task, name in REEFKNOT_FILES.items():
        path = folder / name
        for number, (place, entry) in enumerate(_lines(path, "reefknot"), start=1):
            file = f"{_value(entry, 'image_id', place)}"
            file = file if Path(file).suffix else f"{file}.jpg"
            image = next((root / file for root in roots if (root / file).is_file()), roots[0] / file)
            items.append(
                Item(
                    f"{task}-{number}",
                    (str(image),),
                    prompt=_text(entry, "query_prompt", place),
                    fields={
                        "task": task,
                        "label": _label(entry, place) if task == "yesno" else str(_value(entry, "label", place)),
                        "relation_type": str(_value(entry, "relation_type", place)),
                    },
                    place=place,
                )
            )
    return _with_images(items, "reefknot")


LOADERS: dict[str, Callable[[Path], list[Item]]] = {
    "sugarcrepe": sugarcrepe,
    "sade": sade,
    "bivlc": bivlc,
    "winoground": winoground,
    "rbench": rbench,
    "reefknot": reefknot,
}
HOW_TO_GET = {
    "sugarcrepe": "its seven files are at github.com/RAIVNLab/sugar-crepe, its images are COCO val2017 "
    "(cocodataset.org); or --hub.",
    "sade": "its references are linked from github.com/TeleeMa/SADE; `llava-compodistill sade` converts each; "
    "the images belong in sade/images/.",
    "bivlc": "it is imirandam/BiVLC on the Hugging Face hub: --hub writes this layout.",
    "winoground": "it is facebook/winoground on the Hugging Face hub, gated: accept its terms there and log in "
    "(hf auth login), then --hub writes this layout.",
    "rbench": "its files are at github.com/mrwu-mac/R-Bench, its images are Open Images v4 validation.",
    "reefknot": "its files are at github.com/JackChen-seu/Reefknot, its images are Visual Genome's VG_100K and "
    "VG_100K_2.",
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def read_json(path: Path, how_to_get: str) -> Any:
    """A JSON file.

    Raises:
        MissingData: when it is not there.
        DataError: when it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {how_to_get}") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}).") from None


def _object(path: Path, benchmark: str) -> dict[str, Any]:
    entries = read_json(path, HOW_TO_GET[benchmark])
    if isinstance(entries, list):  # some copies hold a list
        return {str(number): entry for number, entry in enumerate(entries)}
    if not isinstance(entries, dict):
        raise DataError(f"{path}: must hold an object of items, is a {type(entries).__name__}.")
    return entries


def _lines(path: Path, benchmark: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of each line of a JSON-lines file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {HOW_TO_GET[benchmark]}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: no JSON ({error}).") from None
        if not isinstance(entry, dict):
            raise DataError(f"{place}: must be an object, is a {type(entry).__name__}.")
        yield place, entry


def _value(entry: Any, name: str, place: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{place}: has no {name!r}, only {has}.")
    return entry[name]


def _text(entry: Any, name: str, place: str) -> str:
    value = _value(entry, name, place)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {name} must be a text, is {value!r}.")
    return value


def _texts(entry: Any, name: str, place: str) -> list[str]:
    values = _value(entry, name, place)
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{place}: {name} must be a list of texts, is {values!r}.")
    return values


def _label(entry: Any, place: str) -> str:
    label = str(_value(entry, "label", place)).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{place}: label {entry['label']!r} must be yes or no.")
    return label


def _images(benchmark: str, *folders: Path) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = ", ".join(map(str, folders))
    raise MissingData(f"the images of {benchmark} are in none of {looked}: {HOW_TO_GET[benchmark]}")


def _with_images(items: Sequence[Item], benchmark: str) -> list[Item]:
    """The items, if every image is there and no id stands for two."""
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(f"{item.place}: the id {item.id!r} is that of {seen[item.id]} already.")
        seen[item.id] = item.place
    files = {image: item.place for item in reversed(items) for image in item.images}
    missing = {file: place for file, place in reversed(files.items()) if not Path(file).is_file()}
    if missing:
        named = "; ".join(f"{file} of {place}" for file, place in list(missing.items())[:_NAMED])
        more = "; …" if len(missing) > _NAMED else ""
        raise DataError(
            f"{benchmark}: {len(missing)} of {len(files)} images are missing ({named}{more}): {HOW_TO_GET[benchmark]}"
        )
    if not items:
        raise DataError(f"{benchmark}: there are no items.")
    return list(items)
