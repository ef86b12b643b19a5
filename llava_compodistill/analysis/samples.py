"""What the analyses look at: an image, a prompt, the right answer and, where there are any, wrong ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..eval.benchmarks import registered
from ..eval.benchmarks.base import EngineBenchmark, Item
from ..eval.requests import Continuation
from ..hosts.files import parse_json, read_json, read_text

CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        image: file.
        prompt: without `<image>`.
        answer: the right one.
        wrong: others, to compare likelihoods with.
        subset: of its benchmark.
    """

    image: str
    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()
    subset: str = ""

    def asked(self, answer: str | None = None) -> Continuation:
        """As the engine takes it."""
        return Continuation(self.image, self.prompt, self.answer if answer is None else answer)


def read_samples(
    source: str, images: str = "", data_root: Path | None = None, caption_prompt: str = CAPTION_PROMPT
) -> list[Sample]:
    """The samples of a file or a benchmark.

    Args:
        source: a JSON file of LLaVA's training format (its first round is taken), a .jsonl of {image, text, answer},
            or the name of one of the package's benchmarks.
        images: folder that a file's image names begin in.
        data_root: folder of the benchmarks.
        caption_prompt: what is asked where captions are to be matched.

    Raises:
        DataError: naming the file, the entry and the field.
    """
    benchmarks = registered(EngineBenchmark)
    if source in benchmarks:
        if data_root is None:
            raise DataError(f"{source} is a benchmark: give the folder of its files with --data-root.")
        found = [sample for item in benchmarks[source].load(data_root) for sample in _of_item(item, caption_prompt)]
        if not found:
            raise DataError(f"{source}: its items have no right answer in words to look at.")
        return found
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} is neither a file nor a benchmark ({', '.join(benchmarks)}).")
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        found = [_of_line(line, f"{path}, line {number}", images) for number, line in lines if line.strip()]
    else:
        found = _of_conversations(path, images)
    if not found:
        raise DataError(f"{path}: holds no sample with an image and an answer.")
    missing = next((sample.image for sample in found if not os.path.isfile(sample.image)), None)
    if missing is not None:
        raise DataError(f"{path}: the image {missing} is missing; --images names the folder that they begin in.")
    return found


def _of_item(item: Item, caption_prompt: str) -> list[Sample]:
    subset = str(item.fields.get("subset", item.fields.get("category", "")))
    if len(item.images) == 1 and len(item.captions) >= 2:
        return [Sample(item.images[0], caption_prompt, item.captions[0], item.captions[1:], subset)]
    if len(item.images) == len(item.captions) == 2:  # 2 x 2: each caption beside its own image
        return [
            Sample(image, caption_prompt, item.captions[place], (item.captions[1 - place],), subset)
            for place, image in enumerate(item.images)
        ]
    label = item.fields.get("label")
    if item.prompt and isinstance(label, str) and len(item.images) == 1:
        other = {"yes": ("No",), "no": ("Yes",)}.get(label.lower(), ())
        answer = label.capitalize() if other else label
        return [Sample(item.images[0], item.prompt, answer, other, subset)]
    return []


def _of_line(line: str, place: str, images: str) -> Sample:
    entry = parse_json(line, place)
    try:
        image, text, answer = (entry[name] for name in ("image", "text", "answer"))
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: must be a JSON object with image, text and answer ({error}).") from None
    if not isinstance(image, str) or not isinstance(text, str):
        raise DataError(f"{place}: image and text must be texts, are {image!r:.40} and {text!r:.40}.")
    return Sample(os.path.join(images, image), _plain(text), str(answer), subset=str(entry.get("category", "")))


def _of_conversations(path: Path, images: str) -> list[Sample]:
    records = read_json(path)
    try:
        return [
            Sample(
                os.path.join(images, record["image"]),
                _plain(record["conversations"][0]["value"]),
                record["conversations"][1]["value"],
            )
            for record in records
            if record.get("image")
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        message = f"{path}: must be LLaVA's format, a JSON list with image and conversations ({error!r})."
        raise DataError(message) from None


def _plain(text: str) -> str:
    return text.replace("<image>", "").strip()


def thinned(samples: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit`, evenly from all over."""
    if limit <= 0 or len(samples) <= limit:
        return list(samples)
    return [samples[place * len(samples) // limit] for place in range(limit)]
