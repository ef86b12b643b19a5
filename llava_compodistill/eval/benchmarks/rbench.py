"""R-Bench (arXiv 2406.16449): yes/no questions on relations, in five balanced lists. At the image level they are about
the whole image; at the instance level subject and object are marked in it, by boxes or by masks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..marks import Boxes, Masks
from ..reading import YES_NO_READINGS, Reading
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_f1

HOW_TO_GET = (
    "its data are linked from github.com/mrwu-mac/R-Bench (unpacked, they are a folder data_filterd), its images are "
    "Open Images v4 validation."
)
#: Longest answer, in tokens, as in LLaVA's demo that the authors evaluate with.
MAX_NEW_TOKENS = 128
STRICT, OFFICIAL = YES_NO_READINGS
#: How subject and object are marked, and what the questions call it.
COLORS = ("red", "green")
_MARKS = {"box": "bounding box", "mask": "mask"}


def load(data: Path) -> list[Item]:
    """image-level_filterd.json (the authors' spelling): [{question_id, image, text, label, qtype}], and
    nocaps_image-level_rel_ids_{1..5}.json: the ids of the five balanced lists; images of Open Images v4 validation.
    All of it in DATA/rbench or DATA/rbench/data_filterd."""
    return _load(data, "image-level", lambda entry, image, place: (image, files.text(entry, "text", place)))


def load_boxes(data: Path) -> list[Item]:
    """instance-level_filterd.json: entries as at the image level, with `subject`, `object` and their boxes `sub_box`
    and `obj_box` (left, top, right, bottom, each a share of the image's width or height), and the five lists."""

    def marked(entry: Any, image: str, place: str) -> tuple[Any, str]:
        boxes = [_box(entry, name, place) for name in ("sub_box", "obj_box")]
        return Boxes(image, tuple(boxes), COLORS), _question(entry, "box", place)

    return _load(data, "instance-level", marked)


def load_masks(data: Path) -> list[Item]:
    """As `load_boxes`, with a mask a question in instance_mask/QUESTION_ID.png: 1 where the subject is, 2 where the
    object is."""
    folder = _folder(data) / "instance_mask"

    def marked(entry: Any, image: str, place: str) -> tuple[Any, str]:
        mask = folder / f"{entry['question_id']}.png"
        if not mask.is_file():
            raise DataError(f"{place}: its mask {mask} is missing: {HOW_TO_GET}")
        return Masks(image, str(mask), COLORS), _question(entry, "mask", place)

    return _load(data, "instance-level", marked)


def _folder(data: Path) -> Path:
    return files.folder_with("image-level_filterd.json", files.home(data, "rbench"), "data_filterd", "dataset")


def _load(data: Path, level: str, asked: Callable[[Any, str, str], tuple[Any, str]]) -> list[Item]:
    home, folder = files.home(data, "rbench"), _folder(data)
    path = folder / f"{level}_filterd.json"
    entries = files.read_json(path, HOW_TO_GET)
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of questions, is a {type(entries).__name__}.")
    names = ("image/validation", "images/validation", "images", "validation", "image")
    places = [root / name for root in (home, folder) for name in names]
    sample = entries[0].get("image") if entries and isinstance(entries[0], dict) else None
    images = files.image_folder("rbench", HOW_TO_GET, *places, data / "open_images" / "validation", sample=sample)
    known = {str(files.value(entry, "question_id", f"{path}, entry {n}")) for n, entry in enumerate(entries)}
    lists = _lists(folder, level, known, path)
    items = []
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number}"
        key = str(entry["question_id"])
        if key not in lists:
            continue  # in none of the lists: asked of nobody
        image, prompt = asked(entry, str(images / files.text(entry, "image", place)), place)
        fields = {"label": files.yes_no_label(entry, place), "qtype": str(entry.get("qtype", "")), "lists": lists[key]}
        items.append(Item(key, (image,), prompt=prompt, fields=fields, place=place, max_new_tokens=MAX_NEW_TOKENS))
    return files.checked(items, "rbench", HOW_TO_GET)


def _lists(folder: Path, level: str, known: set[str], questions: Path) -> dict[str, list[int]]:
    """Question -> the numbers of the lists that name it, as often as they do: the authors' code counts repeats."""
    lists: dict[str, list[int]] = defaultdict(list)
    for number in range(1, 6):
        names = (f"nocaps_{level}_rel_ids_{number}.json", f"{level}_ids_{number}.json")
        listed = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        ids = files.read_json(listed, HOW_TO_GET)
        if not isinstance(ids, list):
            raise DataError(f"{listed}: must be a list of question ids, is a {type(ids).__name__}.")
        times = Counter(map(str, ids))
        if not times.keys() & known:
            raise DataError(f"{listed}: none of its {len(times)} questions is in {questions.name}.")
        # "filterd": a list may name questions that the authors took out again.
        for key in times.keys() & known:
            lists[key] += [number] * times[key]
    return lists


def _box(entry: Any, name: str, place: str) -> tuple[float, ...]:
    box = files.value(entry, name, place)
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)
    if not numbers or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise DataError(f"{place}: {name} must be [left, top, right, bottom] in shares of the image, is {box!r}.")
    return tuple(map(float, box))


def _question(entry: Any, mark: str, place: str) -> str:
    """The question with "in red …" behind every mention of the subject, then "in green …" behind the object's: in the
    authors' order, so that an object named within the subject is marked there too."""
    text = files.text(entry, "text", place)
    for name, color in zip(("subject", "object"), COLORS, strict=True):
        mention = files.text(entry, name, place).lower()
        text = f"{mention} in {color} {_MARKS[mark]}".join(text.split(mention))
    return text


def score(records: Iterable[Record], reading: Reading = STRICT) -> dict[str, Any]:
    """Yes/no figures of each of the five lists (`lists` names those an item is in, as often as it is), and their
    means."""
    lists: dict[Any, list[Record]] = defaultdict(list)
    records = list(records)
    for record in records:
        for name in figures.field(record, "lists"):
            lists[name].append(record)
    by_list = {
        str(name): figures.yes_no_figures(items, reading.yes_no)
        for name, items in sorted(lists.items(), key=lambda pair: str(pair[0]))
    }
    return {
        **figures.means_of_yes_no(by_list.values()),
        "by_list": by_list,
        "items": len(records),
        "unparsable": figures.unparsable(records, reading.yes_no),
    }


def sums(records: Sequence[Record]) -> Sums:
    """The mean F1 of the lists."""
    return mean_f1(records, lambda record: record["lists"], lambda record: record["label"])


_SHARED: dict[str, Any] = {
    "headline": "f1",
    "protocols": ("answer",),
    "score": score,
    "sums": sums,
    "readings": YES_NO_READINGS,
    "how_to_get": HOW_TO_GET,
}
register(EngineBenchmark(name="rbench", title="R-Bench", load=load, paper=(79.1, 74.3, 78.6), **_SHARED))
register(EngineBenchmark(name="rbench-box", title="R-Bench boxes", load=load_boxes, **_SHARED))
register(EngineBenchmark(name="rbench-mask", title="R-Bench masks", load=load_masks, **_SHARED))
