"""The benchmarks by name: how each is read, asked and scored, and what the paper reports for it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..about import commit
from ..errors import RecordsError
from . import formats, protocols, scorers, shares
from .formats import Item
from .records import RecordFile, fingerprint

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that runs here.

    Attributes:
        protocols: those that fit it, the paper's first.
        headline: the figure that stands in the table, by protocol where that differs.
        paper: the paper's (teacher, SFT, CompoDistill), in %.
        averaged: whether it is one of the four of the paper's CR average.
    """

    name: str
    title: str
    load: Callable[[Path], list[Item]]
    score: Callable[[Iterable[dict[str, Any]]], dict[str, Any]]
    protocols: tuple[str, ...]
    headline: str
    paper: tuple[float, float, float]
    averaged: bool = False


_CAPTIONS = (*protocols.CHOOSING, *protocols.MATCHING)
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "sugarcrepe", "SugarCrepe", formats.sugarcrepe, scorers.sugarcrepe, _CAPTIONS, "overall",
            (83.0, 73.3, 82.9), averaged=True,
        ),
        Benchmark(
            "sade", "SADE", formats.sade, scorers.sade, protocols.MATCHING, "macro", (75.5, 63.9, 69.4), averaged=True
        ),
        Benchmark(
            "bivlc", "BiVLC", formats.bivlc, scorers.bivlc, (*protocols.MATCHING, *protocols.CHOOSING), "pairwise",
            (64.8, 58.5, 63.3), averaged=True,
        ),
        Benchmark(
            "winoground", "Winoground", formats.winoground, scorers.winoground, _CAPTIONS, "pairwise",
            (57.8, 47.2, 51.2), averaged=True,
        ),
        Benchmark("rbench", "R-Bench", formats.rbench, scorers.rbench, ("answer",), "f1", (79.1, 74.3, 78.6)),
        Benchmark(
            "reefknot", "Reefknot", formats.reefknot, scorers.reefknot, ("answer",), "rscore", (67.9, 61.3, 66.7)
        ),
    )
}  # fmt: skip
PAPER_MODELS = ("teacher LLaVA-4B", "SFT 2B", "CompoDistill-2B")


#: Conversation template of a model type, where none is given.
TEMPLATES = {"llava_qwen2": "qwen_1_5", "llava_llama": "v1", "llava": "v1", "llava_mistral": "mistral_instruct"}


def check_checkpoint(model_path: str) -> None:
    """Whether there is a LLaVA checkpoint, before anything is read or written.

    Raises:
        DataError: when there is no such folder, or it holds something else. A name on the hub passes.
    """
    path = Path(model_path)
    if not path.is_dir():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path) and not path.parent.is_dir():
            return  # owner/name, and no folder is called like the owner
        raise formats.DataError(f"checkpoint not found: {model_path}")
    kind = _model_type(path)
    if "llava" not in kind.lower():
        raise formats.DataError(
            f"{path / 'config.json'}: model_type {kind!r} is no LLaVA model. A LoRA or adapter folder has its own "
            "config.json of a llava_… type."
        )


def check_template(name: str) -> None:
    """Raise TemplateError when LLaVA and the plugin know no such conversation template."""
    from ..hosts.llava import register
    from ..hosts.llava.templates import use_template

    register(train=True)
    use_template(name)


def template_of(model_path: str) -> str:
    """The conversation template that a checkpoint's type asks for.

    Raises:
        DataError: when its type is not known.
    """
    try:
        return TEMPLATES.get(_model_type(Path(model_path)), "v1")
    except formats.DataError as error:
        way = "name the conversation template with --conv-mode (CONV_MODE=… for scripts/eval)"
        raise formats.DataError(f"{error} Or {way}.") from None


def _model_type(path: Path) -> str:
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise formats.DataError(
            f"{path / 'config.json'} does not tell the model's type: is {path} a checkpoint's folder?"
        ) from None


def protocol_for(benchmark: Benchmark, wanted: str | None) -> str:
    """The protocol to use: the one wanted where the benchmark has it.

    Raises:
        ValueError: when it is not one of the benchmark's.
    """
    if wanted is None or benchmark.protocols == ("answer",):
        return benchmark.protocols[0]
    if wanted not in benchmark.protocols:
        raise ValueError(f"--protocol {wanted}: {benchmark.title} has {', '.join(benchmark.protocols)}.")
    return wanted


def notes_on(figures: dict[str, Any]) -> list[str]:
    """What is to be said of figures: a benchmark that is there in part, answers that could not be read."""
    notes = []
    if figures.get("missing"):
        notes.append(f"not the whole benchmark, there is nothing of {', '.join(figures['missing'])}.")
    if figures.get("unparsable"):
        notes.append(f"{figures['unparsable']} answers are empty or cannot be read, and count as wrong.")
    return notes


class Run:
    """One benchmark put to one model under one protocol, with its records in OUTPUT/NAME.jsonl.

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
        benchmark: Benchmark,
        items: Sequence[Item],
        made_with: dict[str, Any],
        output: Path,
        protocol: str | None = None,
        caption_prompt: str = protocols.CAPTION_PROMPT,
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
                some = list(group)
                put = [protocols.requests(item, self.protocol, self.caption_prompt) for item in some]
                responses = iter(engine.run([request for requests in put for request in requests]))
                records.append(
                    protocols.record(item, self.protocol, [next(responses) for _ in requests])
                    for item, requests in zip(some, put, strict=True)
                )
                progress(len(some))

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
            "paper": dict(zip(PAPER_MODELS, self.benchmark.paper, strict=True)),
            "commit": commit(),
        }
        text = json.dumps(summary, indent=1) + "\n"
        (self.output / f"{self.benchmark.name}.json").write_text(text, encoding="utf-8")
        return summary
