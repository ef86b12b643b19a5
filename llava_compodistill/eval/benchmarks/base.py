"""What a benchmark is: what it asks, how its answers are scored, and what its headline is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import protocols
from ..requests import Request
from .sums import Sums

Record = Mapping[str, Any]
Score = Callable[[Iterable[Record]], dict[str, Any]]
#: A repository's name on the hub -> the rows of its test split.
LoadRows = Callable[[str], Iterable[dict[str, Any]]]

#: Whose figures `Benchmark.paper` holds (arXiv 2510.12184).
PAPER_MODELS = ("teacher LLaVA-4B", "SFT 2B", "CompoDistill-2B")


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
        max_new_tokens: of an answer in words.
    """

    id: str
    images: tuple[str, ...]
    captions: tuple[str, ...] = ()
    prompt: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    max_new_tokens: int = 16

    def asked(self) -> list[Any]:
        """What `records.fingerprint` takes: the images by name, since folders move."""
        return [self.id, [Path(image).name for image in self.images], self.captions, self.prompt, self.fields]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What every benchmark has; `EngineBenchmark` and `LlavaBenchmark` say how it is asked.

    Attributes:
        name: on the command line and of its files.
        title: in tables.
        headline: the figure that stands in the table.
        score: records -> figures in %, the headline among them (None of no records); None where only a server scores.
        sums: records -> the headline as a function of sums over items, for `compare`; None where `score` is.
        paper: the paper's (teacher, SFT, CompoDistill), in %, or nothing.
        average: the paper's average that it is a part of.
    """

    name: str
    title: str
    headline: str
    score: Score | None = None
    sums: Callable[[Sequence[Record]], Sums] | None = None
    paper: tuple[float, ...] = ()
    average: str = ""

    def paper_figures(self) -> dict[str, float]:
        """{model: figure} of the paper; empty where it has none."""
        return dict(zip(PAPER_MODELS, self.paper, strict=True)) if self.paper else {}


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark(Benchmark):
    """A benchmark whose items this package's engine asks.

    Attributes:
        load: the folder of all benchmarks (--data-root) -> items, all files read and every image there.
        protocols: those that fit it, its default first.
        how_to_get: where its files are from, for messages.
        hub: writes the files that `load` reads into a folder, from rows of the Hugging Face hub.
        requests: (item, protocol, caption prompt) -> what to ask about an item, in a fixed order.
        record: (item, protocol, responses) -> its record, as `score` reads it.
    """

    load: Callable[[Path], list[Item]]
    protocols: tuple[str, ...]
    how_to_get: str = ""
    hub: Callable[[Path, LoadRows], None] | None = None
    requests: Callable[[Item, str, str], list[Request]] = protocols.requests
    record: Callable[[Item, str, Sequence[Any]], dict[str, Any]] = protocols.record
