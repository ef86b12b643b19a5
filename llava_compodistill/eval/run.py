"""One benchmark, one model, one protocol: what is left to ask, the records, and the summary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..about import commit
from ..errors import RecordsError
from . import shares
from .benchmarks.base import EngineBenchmark, Item
from .protocols import CAPTION_PROMPT, CHOOSING, MATCHING
from .records import RecordFile, fingerprint

if TYPE_CHECKING:
    from .engine import Engine


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
        notes.append(f"not the whole benchmark, there is nothing of {', '.join(figures['missing'])}.")
    if figures.get("unparsable"):
        notes.append(f"{figures['unparsable']} answers are empty or cannot be read, and count as wrong.")
    return notes


class Run:
    """One benchmark asked of one model under one protocol, with its records in OUTPUT/NAME.jsonl.

    Args:
        items: what `benchmark.load` gave.
        made_with: `records.made_with` of the model; going on with the records of another is an error.
        protocol: one of the benchmark's; its first by default.

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
        if self.protocol == "likelihood":
            self.about["caption_prompt"] = caption_prompt

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
    ) -> None:
        """Ask the items that are left and append their records, group by group."""
        with RecordFile(path, self.about, self.ids) as records:
            for _, group in itertools.groupby(left, lambda item: self._group[item.id]):
                items = list(group)
                asked = [self.benchmark.requests(item, self.protocol, self.caption_prompt) for item in items]
                responses = iter(engine.run([request for requests in asked for request in requests]))
                records.append(
                    self.benchmark.record(item, self.protocol, [next(responses) for _ in requests])
                    for item, requests in zip(items, asked, strict=True)
                )
                progress(len(items))

    def finish(self) -> dict[str, Any]:
        """Score the records; returns the summary, also written to OUTPUT/NAME.json.

        It depends on the records alone: a resumed run has the same.
        """
        with RecordFile(self.path, self.about, self.ids) as records:
            missing = len(self.ids) - len(records.done)
            if missing:
                raise RecordsError(f"{self.path}: {missing} of {len(self.ids)} items are not answered.")
            figures = self.benchmark.score([records.done[key] for key in self.ids])
        summary = {
            **self.about,
            "headline": self.benchmark.headline,
            "value": figures.get(self.benchmark.headline),
            "figures": figures,
            "note": " ".join(notes_on(figures)),
            "paper": self.benchmark.paper_figures(),
            "commit": commit(),
        }
        text = json.dumps(summary, indent=1) + "\n"
        (self.output / f"{self.benchmark.name}.json").write_text(text, encoding="utf-8")
        return summary
