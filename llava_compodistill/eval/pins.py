"""What a figure depends on beside model and questions, so that a stranger can repeat it and `compare` can refuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..hosts.llava.conversations import prompt_under
from . import protocols


def pins(
    protocol: str,
    template: str,
    files: Mapping[str, str],
    readings: Mapping[str, str],
    limits: Iterable[int],
    *,
    caption_prompt: str = "",
    dtype: str | None = None,
    asked_by: str = "engine",
) -> dict[str, Any]:
    """The pins of an evaluation.

    Args:
        protocol: one of `protocols`, or "LLaVA's".
        template: conversation template.
        files: the benchmark's files below the data root, and their hashes.
        readings: {name: rule} of how answers are read.
        limits: the longest answers that were allowed, in tokens.
        caption_prompt: what captions are asked for with, under `likelihood`.
        dtype: of the model.
        asked_by: "engine", or LLaVA's module.
    """
    found: dict[str, Any] = {"protocol": protocol, "template": template, "prompt": prompt_under(template)}
    if protocol == "likelihood":
        found |= {"question": caption_prompt, "decoding": "none: log-probabilities in float32"}
    elif protocol == "yes":
        found |= {"question": protocols.MATCH_PROMPT, "decoding": "none: log-probabilities in float32"}
    elif protocol in protocols.CHOOSING:
        found |= {
            "question": protocols.CHOICE_PROMPT,
            "options": "both orders, averaged: the true caption as (A), then as (B)",
        }
        found |= {"decoding": "greedy" if protocol == "choice" else "none: log-probabilities in float32"}
    else:
        found |= {"question": "the benchmark's own, word for word", "decoding": "greedy"}
    if found["decoding"] == "greedy":
        found["max_new_tokens"] = sorted(set(limits))
    found["reading"] = dict(readings) or {"rule": protocols.RULES.get(protocol, "the benchmark's own")}
    return found | {"dtype": dtype, "asked_by": asked_by, "files": dict(files)}


def differences(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> list[str]:
    """In what two summaries' pins differ, a line each: `name: a, not b`."""
    if not first or not second:
        return ["not both say how they were made, which earlier versions did not write"]
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [f"{name}: {second.get(name)!r}, not {first.get(name)!r}" for name in names]
