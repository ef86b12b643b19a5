"""What a figure depends on beside model and questions, so that a stranger can repeat it and `compare` can refuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import protocols
from .records import apart

#: What `asking` says.
ASKED = ("prompt", "question", "options", "decoding", "max_new_tokens")
#: The parts of a run that a figure depends on.
PINNED = ("protocol", "template", *ASKED, "dtype", "asked_by")
#: How greedy answers and forwards are called in `decoding`.
GREEDY, FORWARD = "greedy", "none: log-probabilities in float32"


def asking(protocol: str, prompt: str, limits: Iterable[int], caption_prompt: str = "") -> dict[str, Any]:
    """How questions are asked: what answers depend on beside the model.

    Args:
        protocol: one of `protocols`, "LLaVA's", or a benchmark's own.
        prompt: what a question stands in, word for word.
        limits: the longest answers that are allowed, in tokens.
        caption_prompt: what captions are asked for with, under `likelihood`.
    """
    found: dict[str, Any] = {"prompt": prompt}
    if protocol == "likelihood":
        found |= {"question": caption_prompt, "decoding": FORWARD}
    elif protocol == "yes":
        found |= {"question": protocols.MATCH_PROMPT, "decoding": FORWARD}
    elif protocol in protocols.CHOOSING:
        found |= {"question": protocols.CHOICE_PROMPT, "options": "both orders: the true caption as (A), then as (B)"}
        found |= {"decoding": GREEDY if protocol == "choice" else FORWARD}
    else:
        found |= {"question": "the benchmark's own, word for word", "decoding": GREEDY}
    if found["decoding"] == GREEDY:
        found["max_new_tokens"] = sorted(set(limits))
    return found


def pins(run: Mapping[str, Any], readings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The pins of an evaluation.

    Args:
        run: what its records are made with, `asking` among it.
        readings: {name: {"rule", …}} of how answers are read.
        files: the benchmark's files below the data root, and their hashes. They are known by their names, since the
            same files may lie in other folders.
    """
    found = {name: run[name] for name in PINNED if run.get(name) is not None}
    rules = {name: entry["rule"] for name, entry in readings.items()}
    found["reading"] = rules or {"rule": protocols.RULES.get(run["protocol"], "the benchmark's own")}
    names = [name.rsplit("/", 1)[-1] for name in files]
    found["files"] = {
        last if names.count(last) == 1 else name: files[name] for name, last in zip(files, names, strict=True)
    }
    return found


def differences(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> list[str]:
    """In what two summaries' pins differ, a line each."""
    if not first or not second:
        return ["one of the summaries has no pins: it was written by an earlier version"]
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [apart(name, second.get(name), first.get(name)) for name in names]
