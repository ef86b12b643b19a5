"""Winoground (arXiv 2204.03162): two images and two captions of the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import protocols
from ..hub import Hub, unpack, write_whole
from ..reading import Reading
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_of_means

HOW_TO_GET = (
    "it is facebook/winoground on the Hugging Face hub, gated: accept its terms there and log in (hf auth login), "
    "then --hub gets its examples.jsonl and images.zip; or put these two into winoground/ yourself."
)


def load(data: Path) -> list[Item]:
    """DATA/winoground/examples.jsonl: {id, image_0, image_1, caption_0, caption_1, tag}; images in
    DATA/winoground/images, named as the fields say or with .png behind."""
    folder = files.folder_with("examples.jsonl", files.home(data, "winoground"), "data")
    images = files.image_folder("winoground", HOW_TO_GET, folder / "images", folder)

    def file(name: str) -> str:
        return str(images / (name if Path(name).suffix else f"{name}.png"))

    items = []
    for place, entry in files.read_lines(folder / "examples.jsonl", HOW_TO_GET):
        items.append(
            Item(
                str(files.value(entry, "id", place)),
                tuple(file(files.text(entry, name, place)) for name in ("image_0", "image_1")),
                tuple(files.text(entry, name, place) for name in ("caption_0", "caption_1")),
                fields={"tag": str(entry.get("collapsed_tag", entry.get("tag", "")))},
                place=place,
            )
        )
    return files.checked(items, "winoground", HOW_TO_GET)


def score(records: Iterable[Record], reading: Reading | None = None) -> dict[str, Any]:
    """`text`, `image` and `group` (chance 25 / 25 / 16.7) and `pairwise`, the accuracy of the single image-to-text
    choices (chance 50), which alone compares with the paper's figure."""
    records = list(records)
    found = figures.four_way(records, reading)
    named = {"pairwise": found["pairwise"]}
    if "group" in found:
        named |= {"text": found["i2t"], "image": found["t2i"], "group": found["group"]}
    return {**named, **figures.counts(records, reading)}


def sums(records: Sequence[Record]) -> Sums:
    """The mean over items of their image-to-text choices."""
    return mean_of_means(records, figures.pairwise)


def from_hub(folder: Path, hub: Hub) -> None:
    """examples.jsonl and images.zip, gated. Its loading script, which `datasets` no longer runs, is not needed."""
    place = files.folder_with("examples.jsonl", folder, "data")
    if (place / "examples.jsonl").is_file() and (place / "images").is_dir():
        return
    examples, images = (hub.file("facebook/winoground", f"data/{name}") for name in ("examples.jsonl", "images.zip"))
    if not (place / "images").is_dir():
        hub.progress(f"{images}, unpacked")
        unpack(images, place / "images")
    if not (place / "examples.jsonl").is_file():
        write_whole(place / "examples.jsonl", files.read_text(examples))


register(
    EngineBenchmark(
        name="winoground",
        title="Winoground",
        headline="pairwise",
        load=load,
        protocols=(*protocols.CHOOSING, *protocols.MATCHING),
        score=score,
        sums=sums,
        readings=protocols.LETTER_READINGS,
        how_to_get=HOW_TO_GET,
        hub=from_hub,
        paper=(57.8, 47.2, 51.2),
        paper_protocols=("choice",),
        paper_kind="inferred",
        average="CR average",
    )
)
