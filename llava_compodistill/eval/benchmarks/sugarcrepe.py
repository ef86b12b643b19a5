"""SugarCrepe (arXiv 2306.14610): which of two captions is true of an image, seven kinds of change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import protocols
from ..hub import save_image, write_whole
from . import figures, files, register
from .base import EngineBenchmark, Item, LoadRows, Record
from .sums import Sums, mean_of_means

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
HOW_TO_GET = (
    "its seven files are at github.com/RAIVNLab/sugar-crepe, its images are COCO val2017 (cocodataset.org); or --hub."
)


def load(data: Path) -> list[Item]:
    """DATA/sugarcrepe/{add_att,…}.json: {"0": {filename, caption, negative_caption}, …}; images of COCO val2017."""
    folder = data / "sugarcrepe"
    places = (folder / "images", folder / "val2017", data / "coco" / "val2017", data / "val2017")
    images = files.image_folder("sugarcrepe", HOW_TO_GET, *places)
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


def score(records: Iterable[Record]) -> dict[str, Any]:
    """Accuracy by subset and their unweighted mean, `overall` (chance 50)."""
    subsets = figures.grouped(records, "subset", SUBSETS)
    by_subset = {name: figures.percent(map(figures.pair_accuracy, items)) for name, items in subsets.items()}
    everything = [record for items in subsets.values() for record in items]
    return {
        "overall": figures.mean(by_subset.values()),
        "micro": figures.percent(map(figures.pair_accuracy, everything)),
        **by_subset,
        **figures.counts(everything),
    }


def sums(records: Sequence[Record]) -> Sums:
    """The mean over subsets."""
    return mean_of_means(records, figures.pair_accuracy, lambda record: record["subset"])


def from_hub(folder: Path, load_rows: LoadRows) -> None:
    """A data set a subset."""
    for subset in SUBSETS:
        path = folder / f"{subset}.json"
        if path.is_file():
            continue
        items = {}
        for number, row in enumerate(load_rows(f"HuggingFaceM4/SugarCrepe_{subset}")):
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
        how_to_get=HOW_TO_GET,
        hub=from_hub,
        paper=(83.0, 73.3, 82.9),
        average="CR average",
    )
)
