"""What a benchmark is: what it asks, how its answers are scored, and what its headline is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import protocols
from ..marks import Picture
from ..reading import Reading
from ..requests import Request
from .sums import Sums

if TYPE_CHECKING:
    from ..hub import Hub

Record = Mapping[str, Any]
#: (records[, reading]) -> figures in %.
Score = Callable[..., dict[str, Any]]

#: Whose figures `Benchmark.paper` holds (arXiv 2510.12184).
PAPER_MODELS = ("teacher LLaVA-4B", "SFT 2B", "CompoDistill-2B")


@dataclass(frozen=True)
class Item:
    """One thing that a benchmark asks.

    Attributes:
        id: unique in its benchmark.
        images: files, or files with marks; one, or two for 2 x 2 benchmarks.
        captions: to be matched with the images; the first belongs to the first image.
        prompt: a question to answer in words, where there are no captions.
        fields: goes into the record as it is: subset, category, label, …
        place: file and line that it comes from, for messages.
        max_new_tokens: of an answer in words.
    """

    id: str
    images: tuple[Picture, ...]
    captions: tuple[str, ...] = ()
    prompt: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    max_new_tokens: int = 16

    def asked(self) -> list[Any]:
        """What `records.fingerprint` takes: the images by name, since folders move, and how they are marked."""
        images = [
            Path(image).name if isinstance(image, str) else [Path(image).name, *image.marks()] for image in self.images
        ]
        return [self.id, images, self.captions, self.prompt, self.fields]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What every benchmark has; `EngineBenchmark` and `LlavaBenchmark` say how it is asked.

    Attributes:
        name: on the command line and of its files.
        title: in tables.
        headline: the figure that stands in the table.
        score: records -> figures in %, the headline among them (None of no records); None where only a server scores.
            Where there are several `readings`, it takes one of them as a second argument.
        sums: records -> the headline as a function of sums over items, for `compare`; None where `score` is.
        readings: the rules by which answers in words are read, the default first.
        beside: figures that the table shows below the headline, where there are any.
        remarks: figures -> what their reader has to know, for the summary's note.
        paper: the paper's (teacher, SFT, CompoDistill), in %, or nothing. They stand beside the figure by the reading
            "official", if there is one.
        paper_protocols: those under which a figure is of the paper's kind; none: under all.
        paper_kind: "published" where the paper's evaluator is known, "inferred" where only one fits its figures,
            "unknown" else.
        average: the paper's average that it is a part of.
    """

    name: str
    title: str
    headline: str
    score: Score | None = None
    sums: Callable[[Sequence[Record]], Sums] | None = None
    readings: tuple[Reading, ...] = ()
    beside: tuple[str, ...] = ()
    remarks: Callable[[Mapping[str, Any]], list[str]] = lambda figures: []
    paper: tuple[float, ...] = ()
    paper_protocols: tuple[str, ...] = ()
    paper_kind: str = "published"
    average: str = ""

    def paper_figures(self, protocol: str) -> dict[str, float]:
        """{model: figure} of the paper that a figure under a protocol can stand beside; empty where there is none."""
        if not self.paper or (self.paper_protocols and protocol not in self.paper_protocols):
            return {}
        return dict(zip(PAPER_MODELS, self.paper, strict=True))

    def readings_under(self, protocol: str) -> tuple[Reading, ...]:
        """The readings of the answers under a protocol: none where it asks for likelihoods."""
        return self.readings if protocol not in protocols.RULES else ()

    def scored(self, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """The part of a summary that says what the records are worth: the default reading's `value` and `figures`, and
        under `readings` the rules of all readings and what the others give."""
        if self.score is None:
            return {"value": None, "figures": {}, "readings": {}}
        figures = self.score(records)
        readings: dict[str, Any] = {}
        for number, reading in enumerate(self.readings_under(protocol)):
            readings[reading.name] = {"rule": reading.rule}
            if number:
                other = self.score(records, reading)
                readings[reading.name] |= {"value": other.get(self.headline), "figures": other}
        return {"value": figures.get(self.headline), "figures": figures, "readings": readings}


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark(Benchmark):
    """A benchmark whose items this package's engine asks.

    Attributes:
        load: the folder of all benchmarks (--data-root) -> items, all files read and every image there.
        protocols: those that fit it, its default first.
        how_to_get: where its files are from, for messages.
        hub: writes the files that `load` reads into a folder, from what lies on the Hugging Face hub.
        judged: records -> (id, answer, label) of those whose answers a judge may decide on (`--judge`).
        requests: (item, protocol, caption prompt) -> what to ask about an item, in a fixed order.
        record: (item, protocol, responses) -> its record, as `score` reads it.
    """

    load: Callable[[Path], list[Item]]
    protocols: tuple[str, ...]
    how_to_get: str = ""
    hub: Callable[[Path, Hub], None] | None = None
    judged: Callable[[Iterable[Record]], list[tuple[str, str, str]]] | None = None
    requests: Callable[[Item, str, str], list[Request]] = protocols.requests
    record: Callable[[Item, str, Sequence[Any]], dict[str, Any]] = protocols.record
