"""R-Bench (arXiv 2406.16449), image level: yes/no questions on relations, in five balanced lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..reading import yes_or_no
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_f1

HOW_TO_GET = "its files are at github.com/mrwu-mac/R-Bench, its images are Open Images v4 validation."


def load(data: Path) -> list[Item]:
    """DATA/rbench/image-level_filterd.json (the authors' spelling): [{question_id, image, text, label, qtype}], and
    nocaps_image-level_rel_ids_{1..5}.json: the ids of the five balanced lists; images of Open Images v4 validation."""
    folder = data / "rbench"
    places = (folder / "images", folder / "validation", data / "open_images" / "validation")
    images = files.image_folder("rbench", HOW_TO_GET, *places)
    path = folder / "image-level_filterd.json"
    entries = files.read_json(path, HOW_TO_GET)
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of questions, is a {type(entries).__name__}.")
    lists: dict[str, list[int]] = {}
    known = {str(files.value(entry, "question_id", f"{path}, entry {n}")) for n, entry in enumerate(entries)}
    for number in range(1, 6):
        listed = folder / f"nocaps_image-level_rel_ids_{number}.json"
        ids = dict.fromkeys(map(str, files.read_json(listed, HOW_TO_GET)))
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
        label = files.yes_no_label(entry, place)
        items.append(
            Item(
                key,
                (str(images / files.text(entry, "image", place)),),
                prompt=files.text(entry, "text", place),
                fields={"label": label, "qtype": str(entry.get("qtype", "")), "lists": lists[key]},
                place=place,
            )
        )
    return files.checked(items, "rbench", HOW_TO_GET)


def score(records: Iterable[Record]) -> dict[str, Any]:
    """Yes/no figures of each of the five lists (`lists` names those an item is in), and their means. An empty answer
    is wrong and no "yes"."""
    lists: dict[Any, list[Record]] = defaultdict(list)
    records = list(records)
    for record in records:
        for name in figures.field(record, "lists"):
            lists[name].append(record)
    by_list = {
        str(name): figures.yes_no_figures(items)
        for name, items in sorted(lists.items(), key=lambda pair: str(pair[0]))
    }
    return {
        **figures.means_of_yes_no(by_list.values()),
        "by_list": by_list,
        "items": len(records),
        "unparsable": figures.unparsable(records, yes_or_no),
    }


def sums(records: Sequence[Record]) -> Sums:
    """The mean F1 of the lists."""
    return mean_f1(records, lambda record: record["lists"], lambda record: record["label"])


register(
    EngineBenchmark(
        name="rbench",
        title="R-Bench",
        headline="f1",
        load=load,
        protocols=("answer",),
        score=score,
        sums=sums,
        how_to_get=HOW_TO_GET,
        paper=(79.1, 74.3, 78.6),
    )
)
