"""One benchmark, one model, one protocol: what is left to ask, the records, and the summary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..about import __version__, commit
from ..errors import DataError, RecordsError
from . import shares
from .benchmarks.base import EngineBenchmark, Item
from .pins import ASKED, asking, pins
from .protocols import CAPTION_PROMPT, CHOOSING, MATCHING
from .protocols import MAX_NEW_TOKENS as LONGEST_CHOICE
from .records import RecordFile, fingerprint, scoring

if TYPE_CHECKING:
    from .engine import Engine
    from .judge import Verdicts
    from .marks import Picture


#: So many items in a row that cannot be asked end a benchmark.
_MANY = 8


def protocol_for(benchmark: EngineBenchmark, wanted: str | None) -> str:
    """The protocol to use: the one wanted where the benchmark has it.

    Raises:
        ValueError: when it is not one of the benchmark's.
    """
    if wanted is None or not {*CHOOSING, *MATCHING} & {*benchmark.protocols}:  # it matches no captions
        return benchmark.protocols[0]
    if wanted not in benchmark.protocols:
        raise ValueError(f"--protocol {wanted}: {benchmark.title} has {', '.join(benchmark.protocols)}.")
    return wanted


def notes_on(figures: dict[str, Any]) -> list[str]:
    """Notes for the reader of figures: a benchmark that is there in part, answers that could not be read."""
    notes = []
    if figures.get("missing"):
        notes.append(f"Incomplete: no data for {', '.join(figures['missing'])}.")
    if figures.get("unparsable"):
        notes.append(f"{figures['unparsable']} answers are empty or cannot be read, and count as wrong.")
    return notes


class Run:
    """One benchmark asked of one model under one protocol, with its records in OUTPUT/NAME.jsonl.

    Args:
        items: what `benchmark.load` gave.
        made_with: `records.made_with` of the model; going on with the records of another is an error.
        protocol: one of the benchmark's; its first by default.
        files: hashes of the benchmark's files, for the pins.
        prompt: what a question stands in, word for word, for the pins.

    Attributes:
        at_once: items are asked in groups of so many, by their place in the benchmark: what is computed together does
            not depend on kills or on the number of processes, and so neither does the rounding.
    """

    def __init__(
        self,
        benchmark: EngineBenchmark,
        items: Sequence[Item],
        made_with: dict[str, Any],
        output: Path,
        protocol: str | None = None,
        caption_prompt: str = CAPTION_PROMPT,
        files: Mapping[str, str] | None = None,
        prompt: str = "",
    ):
        self.benchmark, self.items, self.output = benchmark, list(items), output
        self.protocol, self.caption_prompt = protocol_for(benchmark, protocol), caption_prompt
        self.path = output / f"{benchmark.name}.jsonl"
        self.ids = [item.id for item in items]
        self.at_once = max(8, min(64, len(items) // 8))
        self._group = {key: number // self.at_once for number, key in enumerate(self.ids)}
        self.about = {
            "benchmark": benchmark.name,
            "protocol": self.protocol,
            **made_with,
            "items": len(items),
            "fingerprint": fingerprint(item.asked() for item in items),
        }
        limits = [LONGEST_CHOICE] if self.protocol == "choice" else [item.max_new_tokens for item in items]
        #: What answers depend on beside model and questions; going on with records of other values is an error.
        self.about |= asking(self.protocol, prompt, limits, caption_prompt)
        self.files = dict(files or {})

    def begin(self, overwrite: bool = False) -> list[Item]:
        """Join what earlier processes left; returns the items that are left to ask.

        Raises:
            RecordsError: for records of another run.
        """
        done = shares.join(self.path, self.about, self.ids, overwrite)
        return [item for item in self.items if item.id not in done]

    def share(self, left: Sequence[Item], number: int, count: int) -> list[Item]:
        """Every `count`-th group of what is left: what lies together, and often on one image, stays together."""
        return [item for item in left if self._group[item.id] % count == number]

    def ask(
        self, engine: Engine, left: Sequence[Item], path: Path, progress: Callable[[int], None] = lambda items: None
    ) -> list[str]:
        """Ask the items that are left and append their records, group by group.

        Raises:
            RecordsError: when of many items in a row none can be asked: that is hardly their fault.

        Returns:
            Why items have no record, each with its file and line: an image that cannot be read, or a text.
        """
        wrong: list[str] = []
        groups = [list(group) for _, group in itertools.groupby(left, lambda item: self._group[item.id])]
        with RecordFile(path, self.about, self.ids) as records, engine.expecting(_images(groups)):
            for items in groups:
                asked = [self.benchmark.requests(item, self.protocol, self.caption_prompt) for item in items]
                flat = [request for requests in asked for request in requests]
                responses = iter(engine.run(flat, keep_going=True))
                made = []
                for item, requests in zip(items, asked, strict=True):
                    given = [next(responses) for _ in requests]
                    broken = [response for response in given if isinstance(response, DataError)]
                    if broken:
                        wrong.append(f"{item.place or item.id}: {broken[0]}")
                    else:
                        made.append(self.benchmark.record(item, self.protocol, given))
                if not made and len(items) >= _MANY:
                    raise RecordsError(f"None of {len(items)} items in a row can be asked: {wrong[-1]}")
                records.append(made)
                progress(len(items))
        return wrong

    def finish(self, wrong: Sequence[str] = (), verdicts: Verdicts | None = None) -> dict[str, Any]:
        """Score the records; returns the summary, also written to OUTPUT/NAME.json.

        It depends on the records alone: a resumed run has the same.

        Args:
            wrong: what `ask` gave: why items have no record.
            verdicts: a judge's, on answers that the benchmark lets one decide on.

        Raises:
            RecordsError: for items without a record.
        """
        with RecordFile(self.path, self.about, self.ids) as records:
            missing = len(self.ids) - len(records.done)
            if missing:
                why = f" {wrong[0]}" + (f" {len(wrong) - 1} more are like it." if wrong[1:] else "") if wrong else ""
                raise RecordsError(
                    f"{self.path}: {missing} of {len(self.ids)} items are not answered; the others are kept, and the "
                    f"same command asks what is left.{why}"
                )
            made = [records.done[key] for key in self.ids]
        if verdicts is not None:
            made = [{**record, **verdicts.of(record["id"])} for record in made]
        with scoring(self.path, self.benchmark.title):
            scored = self.benchmark.scored(made, self.protocol)
        summary = {
            **{name: value for name, value in self.about.items() if name not in ASKED},
            "pins": pins(self.about, scored["readings"], self.files),
            "headline": self.benchmark.headline,
            **scored,
            "judge": verdicts.judge if verdicts is not None else None,
            "note": " ".join([*notes_on(scored["figures"]), *self.benchmark.remarks(scored["figures"])]),
            "paper": self.benchmark.paper_figures(self.protocol),
            "version": __version__,
            "commit": commit(),
        }
        text = json.dumps(summary, indent=1) + "\n"
        (self.output / f"{self.benchmark.name}.json").write_text(text, encoding="utf-8")
        return summary


def _images(groups: Sequence[Sequence[Item]]) -> Iterator[Picture]:
    """The images of groups of items in the order in which the engine reads them: once a group."""
    for items in groups:
        yield from dict.fromkeys(image for item in items for image in item.images)
