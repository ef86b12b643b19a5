"""BiVLC (arXiv 2406.09952): two captions and two images, the second image made for the false caption."""

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

HOW_TO_GET = (
    "it is imirandam/BiVLC on the Hugging Face hub: --hub gets it, or download it yourself into bivlc/ "
    "(hf download --repo-type dataset)."
)


def load(data: Path) -> list[Item]:
    """DATA/bivlc/bivlc.jsonl: {image, caption, negative_image, negative_caption, type, subtype}; images in
    DATA/bivlc/images."""
    folder = files.home(data, "bivlc")
    images = files.image_folder("bivlc", HOW_TO_GET, folder / "images", folder)
    items = []
    for number, (place, entry) in enumerate(files.read_lines(folder / "bivlc.jsonl", HOW_TO_GET)):
        items.append(
            Item(
                str(entry.get("id", number)),
                tuple(str(images / files.text(entry, name, place)) for name in ("image", "negative_image")),
                tuple(files.text(entry, name, place) for name in ("caption", "negative_caption")),
                fields={"type": files.text(entry, "type", place), "subtype": str(entry.get("subtype", ""))},
                place=place,
            )
        )
    return files.checked(items, "bivlc", HOW_TO_GET)


def score(records: Iterable[Record], reading: Reading | None = None) -> dict[str, Any]:
    """`i2t`, `t2i` and `group` (chance 25 / 25 / 16.7), the four one-sided accuracies (chance 50), and `group` by the
    type of change."""
    records = list(records)
    found = figures.four_way(records, reading)
    for kind, items in sorted(figures.grouped((r for r in records if "type" in r), "type").items()):
        found[f"group_{kind}"] = figures.four_way(items, reading).get("group")
    return {**found, **figures.counts(records, reading)}


def sums(records: Sequence[Record]) -> Sums:
    """The mean over items of their image-to-text choices."""
    return mean_of_means(records, figures.pairwise)


def from_hub(folder: Path, hub: Hub) -> None:
    """One data set."""
    path = folder / "bivlc.jsonl"
    if path.is_file():
        return
    entries = []
    for number, row in enumerate(hub.rows("imirandam/BiVLC")):
        entry = {name: row[name] for name in ("caption", "negative_caption", "type", "subtype") if name in row}
        for name in ("image", "negative_image"):
            entry[name] = save_image(row[name], folder / "images" / f"{number:05d}_{name}.png")
        entries.append(entry)
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))


register(
    EngineBenchmark(
        name="bivlc",
        title="BiVLC",
        headline="pairwise",
        load=load,
        protocols=(*protocols.MATCHING, *protocols.CHOOSING),
        score=score,
        sums=sums,
        readings=protocols.LETTER_READINGS,
        how_to_get=HOW_TO_GET,
        hub=from_hub,
        paper=(64.8, 58.5, 63.3),
        paper_protocols=("likelihood",),
        paper_kind="unknown",
        average="CR average",
    )
)
