"""The benchmarks by name: how each is read, asked and scored, and what the paper reports for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..env_report import commit
from . import formats, protocols, scorers
from .engine import Engine
from .formats import Item
from .records import RecordFile, fingerprint


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


def run_benchmark(
    benchmark: Benchmark,
    items: Sequence[Item],
    engine: Engine,
    model_name: str,
    output: Path,
    *,
    protocol: str | None = None,
    caption_prompt: str = protocols.CAPTION_PROMPT,
    overwrite: bool = False,
    at_once: int = 64,
    progress: Callable[[int], None] = lambda items: None,
) -> dict[str, Any]:
    """Ask, record and score; what OUTPUT/NAME.jsonl holds already is not asked again.

    Args:
        items: what `benchmark.load` gave.
        model_name: kept with the records; going on with another model's records is an error.
        at_once: items between two writes to the disk.
        progress: called with the number of items that are done.

    Returns:
        The summary, also written to OUTPUT/NAME.json.

    Raises:
        RecordsError: for records of another run.
    """
    protocol = protocol_for(benchmark, protocol)
    run = {
        "benchmark": benchmark.name,
        "protocol": protocol,
        "model": model_name,
        "template": engine.version,
        "items": len(items),
        "fingerprint": fingerprint(item.asked() for item in items),
    }
    if protocol == "likelihood":
        run["caption_prompt"] = caption_prompt
    path = output / f"{benchmark.name}.jsonl"
    started, asked = time.monotonic(), 0
    with RecordFile(path, run, [item.id for item in items], overwrite) as records:
        left = [item for item in items if item.id not in records.done]
        progress(len(items) - len(left))
        for start in range(0, len(left), at_once):
            some = left[start : start + at_once]
            put = [protocols.requests(item, protocol, caption_prompt) for item in some]
            responses = iter(engine.run([request for requests in put for request in requests]))
            records.append(
                protocols.record(item, protocol, [next(responses) for _ in requests])
                for item, requests in zip(some, put, strict=True)
            )
            asked += len(some)
            progress(len(some))
        done = [records.done[item.id] for item in items]
    figures = benchmark.score(done)
    summary = {
        **run,
        "headline": benchmark.headline,
        "value": figures.get(benchmark.headline),
        "figures": figures,
        "paper": dict(zip(PAPER_MODELS, benchmark.paper, strict=True)),
        "commit": commit(),
    }
    (output / f"{benchmark.name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    # How long it took is of this run alone: a resumed run has the same summary.
    return {**summary, "asked": asked, "seconds": time.monotonic() - started}
