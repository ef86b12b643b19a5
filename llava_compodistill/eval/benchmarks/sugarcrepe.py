"""SugarCrepe (arXiv 2306.14610): which of two captions is true of an image, seven kinds of change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import protocols
from ..hub import Hub, save_image, write_whole
from ..reading import Reading
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_of_means

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
HOW_TO_GET = (
    "its seven files are at github.com/RAIVNLab/sugar-crepe, its images are COCO val2017 (cocodataset.org); or --hub."
)


def load(data: Path) -> list[Item]:
    """{add_att,…}.json: {"0": {filename, caption, negative_caption}, …}, in DATA/sugarcrepe or its data folder; images
    of COCO val2017 there, or in coco/images/val2017 below the data root."""
    home = files.home(data, "sugarcrepe")
    folder = files.folder_with(f"{SUBSETS[0]}.json", home, "data")
    names = ("images", "val2017", "coco/images/val2017", "coco/val2017")
    images = files.image_folder(
        "sugarcrepe",
        HOW_TO_GET,
        *(place / name for place in (folder, home, data) for name in names),
        sample=_first_image(folder / f"{SUBSETS[0]}.json"),
    )
    items = []
    for subset in SUBSETS:
        path = folder / f"{subset}.json"
        for key, entry in files.read_object(path, HOW_TO_GET).items():
            place = f"{path}, item {key}"
            items.append(
                Item(
                    f"{subset}-{key}",
                    (str(images / files.text(entry, "filename", place)),),
                    (files.text(entry, "caption", place), files.text(entry, "negative_caption", place)),
                    fields={"subset": subset},
                    place=place,
                )
            )
    return files.checked(items, "sugarcrepe", HOW_TO_GET)


def _first_image(path: Path) -> Any:
    entries = files.read_object(path, HOW_TO_GET) if path.is_file() else {}
    return next((entry.get("filename") for entry in entries.values() if isinstance(entry, dict)), None)


def score(records: Iterable[Record], reading: Reading | None = None) -> dict[str, Any]:
    """Accuracy by subset and their unweighted mean, `overall` (chance 50). Under `choice` also the accuracy by the
    place of the true caption, `pos_first` and `neg_first`, as the authors' code reports it."""
    subsets = figures.grouped(records, "subset", SUBSETS)
    everything = [record for items in subsets.values() for record in items]

    def percent(items: list[Record]) -> float | None:
        return figures.percent(figures.pair_accuracy(record, reading) for record in items)

    by_subset = {name: percent(items) for name, items in subsets.items()}
    return {
        "overall": figures.mean(by_subset.values()),
        "micro": percent(everything),
        **by_subset,
        **_by_order(subsets, reading),
        **figures.counts(everything, reading),
    }


def _by_order(subsets: dict[str, list[Record]], reading: Reading | None) -> dict[str, Any]:
    """`pos_first` and `neg_first`: by subset, and the mean over the subsets."""
    places = {"pos_first": 0, "neg_first": 1}
    found: dict[str, Any] = {}
    for name, place in places.items():
        by_subset = {
            subset: figures.percent(
                figures.choice_is_right(choice, reading)
                for record in items
                for choice in (figures.choices(record) if "choices" in record else ())
                if choice["options"].index(choice.get("image", 0)) == place
            )
            for subset, items in subsets.items()
        }
        if any(value is not None for value in by_subset.values()):
            found[name] = figures.mean(value for value in by_subset.values() if value is not None)
            found[f"{name}_by_subset"] = by_subset
    return found


def sums(records: Sequence[Record]) -> Sums:
    """The mean over subsets."""
    return mean_of_means(records, figures.pair_accuracy, lambda record: record["subset"])


def from_hub(folder: Path, hub: Hub) -> None:
    """A data set a subset, unless the authors' own files are there."""
    place = files.folder_with(f"{SUBSETS[0]}.json", folder, "data")
    for subset in SUBSETS:
        path = place / f"{subset}.json"
        if path.is_file():
            continue
        items = {}
        for number, row in enumerate(hub.rows(f"HuggingFaceM4/SugarCrepe_{subset}", alone=False)):
            true, false = row["tested_labels"][:2]
            file = save_image(row["image"], folder / "images" / f"{subset}_{number:05d}.png")
            items[str(number)] = {"filename": file, "caption": true, "negative_caption": false}
        write_whole(path, json.dumps(items, indent=1))


register(
    EngineBenchmark(
        name="sugarcrepe",
        title="SugarCrepe",
        headline="overall",
        load=load,
        protocols=(*protocols.CHOOSING, *protocols.MATCHING),
        score=score,
        sums=sums,
        readings=protocols.LETTER_READINGS,
        how_to_get=HOW_TO_GET,
        hub=from_hub,
        paper=(83.0, 73.3, 82.9),
        paper_protocols=("choice",),
        average="CR average",
    )
)
