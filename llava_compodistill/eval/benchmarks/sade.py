"""SADE (arXiv 2308.10509): six categories of compositional matching. `llava-compodistill sade` (`sade_sources`) makes
its file from its sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from .. import protocols
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_of_means

CATEGORIES = ("comprehensive", "relation", "attribute", "atomic", "negate", "content")
#: Categories that SADE takes from two data sets: VL-CheckList and ARO-VG, VL-CheckList and ARO-VG, COCO and Flickr30k.
TWO_SOURCES = ("relation", "attribute", "content")
HOW_TO_GET = (
    "its references are linked from github.com/TeleeMa/SADE; `llava-compodistill sade` converts each; the images "
    "belong in sade/images/."
)


def load(data: Path) -> list[Item]:
    """DATA/sade/sade.jsonl: {id, category, source, image, positive, negatives[]}; for `comprehensive` {id, category,
    source, images[2], captions[2]}; images in DATA/sade/images. (The public files' own keys differ by source; this is
    the form to convert them to.)"""
    folder = files.home(data, "sade")
    images = files.image_folder("sade", HOW_TO_GET, folder / "images", folder)
    items = []
    for place, entry in files.read_lines(folder / "sade.jsonl", HOW_TO_GET):
        category = files.text(entry, "category", place)
        if category not in CATEGORIES:
            raise DataError(f"{place}: category {category!r} must be one of {', '.join(CATEGORIES)}.")
        if category == "comprehensive":
            names, captions = files.texts(entry, "images", place), files.texts(entry, "captions", place)
            if len(names) != 2 or len(captions) != 2:
                raise DataError(f"{place}: a comprehensive item has two images and two captions.")
        else:
            names = [files.text(entry, "image", place)]
            captions = [files.text(entry, "positive", place), *files.texts(entry, "negatives", place)]
            if len(captions) < 2:
                raise DataError(f"{place}: negatives is empty.")
        items.append(
            Item(
                str(files.value(entry, "id", place)),
                tuple(str(images / name) for name in names),
                tuple(captions),
                fields={"category": category, "source": entry.get("source", "")},
                place=place,
            )
        )
    return files.checked(items, "sade", HOW_TO_GET)


def score(records: Iterable[Record]) -> dict[str, Any]:
    """Recall@1 of the true caption among its negatives, by category; `comprehensive` is Winoground's group score.

    A category is the mean over its sources (arXiv 2308.10509, Table 2: "the average performance of two sub-branches"),
    whose figures `by_source` holds. `macro` averages the categories, `micro` the items. `pooled` has the categories as
    means over their items, and `macro_pooled` the mean of those. `missing` names categories of which there is nothing,
    or one source of two.
    """
    categories = figures.grouped(records, "category", CATEGORIES)
    everything = [record for items in categories.values() for record in items]
    by_source = {
        name: {source: figures.percent(map(hit, some)) for source, some in _by_source(items).items()}
        for name, items in categories.items()
    }
    by_category = {name: figures.mean(found.values()) for name, found in by_source.items()}
    pooled = {name: figures.percent(map(hit, items)) for name, items in categories.items()}
    missing = figures.missing(categories, CATEGORIES)
    halves = [f"a second source of {name}" for name in TWO_SOURCES if len(by_source.get(name, ())) == 1]
    if halves:
        missing = {"missing": [*missing.get("missing", []), *halves]}
    return {
        "macro": figures.mean(by_category.values()),
        "macro_without_comprehensive": figures.mean(
            value for name, value in by_category.items() if name != "comprehensive"
        ),
        "macro_pooled": figures.mean(pooled.values()),
        "micro": figures.percent(map(hit, everything)),
        **by_category,
        "by_source": by_source,
        "pooled": pooled,
        **missing,
        **figures.counts(everything),
    }


def _by_source(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that name no source are of one."""
    return figures.grouped(({"source": "", **record} for record in records), "source")


def hit(record: Record) -> float:
    """Whether an item is right, by its category."""
    if record["category"] == "comprehensive":
        return float(all(figures.two_by_two(record)))
    return figures.pair_accuracy(record)


def sums(records: Sequence[Record]) -> Sums:
    """The mean over categories of the means over their sources."""
    return mean_of_means(
        records, hit, lambda record: (record["category"], record.get("source", "")), lambda stratum: stratum[0]
    )


register(
    EngineBenchmark(
        name="sade",
        title="SADE",
        headline="macro",
        load=load,
        protocols=protocols.MATCHING,
        score=score,
        sums=sums,
        how_to_get=HOW_TO_GET,
        paper=(75.5, 63.9, 69.4),
        paper_protocols=("likelihood",),
        paper_kind="unknown",
        average="CR average",
    )
)
