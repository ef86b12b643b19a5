"""LLaVA's training data, checked before the first step.

The format is LLaVA's: a JSON list of {"id", "image" (optional), "conversations": [{"from", "value"}, ...]}.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from typing import Any

from ..errors import DataError, SampleError
from ..hosts.llava.training import DataCollatorForSupervisedDataset, LazySupervisedDataset

logger = logging.getLogger(__name__)

_SHOWN = 5


class CheckedDataset(LazySupervisedDataset):
    """LLaVA's lazy data set; bad samples are found at the start, and those that hide until they are read name
    themselves.

    Args:
        data_path: JSON file.
        tokenizer: of the student.
        data_args: LLaVA's data arguments with `bad_samples` ("error" or "skip") and `check_images`.

    Raises:
        DataError: for an unreadable file, or bad samples under "error".
    """

    def __init__(self, data_path: str, tokenizer: Any, data_args: Any):
        records = read_records(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args
        data_args.image_folder = data_args.image_folder or ""
        self.list_data_dict = check_records(
            records, data_path, data_args.image_folder, data_args.bad_samples, data_args.check_images
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            try:
                return super().__getitem__(position)
            except (SampleError, OSError, ValueError, AssertionError) as error:
                record = self.list_data_dict[position]
                cause = str(error)
                if isinstance(error, AssertionError):  # LLaVA's own preprocessing, which says no more
                    cause = "the conversation does not have the form that the template asks for"
                message = f"sample {record.get('id', position)!r} (image {record.get('image')!r}): {cause}"
                if self.data_args.bad_samples == "error":
                    raise DataError(f"{message}. --bad_samples skip passes over such samples.") from error
                logger.warning("Skipped %s", message)
        raise DataError("No sample of the data can be used.")


def read_records(path: str) -> list[dict[str, Any]]:
    """Read a LLaVA data file.

    Raises:
        DataError: naming the file and, for malformed JSON, the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            records = json.load(file)
    except FileNotFoundError:
        raise DataError(f"--data_path {path}: there is no such file.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"--data_path {path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"--data_path {path}: must hold a non-empty JSON list of samples.")
    return records


def check_records(
    records: list[dict[str, Any]], source: str, image_folder: str | None, bad_samples: str, check_images: bool = True
) -> list[dict[str, Any]]:
    """Keep the usable samples.

    Raises:
        DataError: when there are bad samples and `bad_samples` is "error", or none is left.
    """
    problems: list[tuple[int, str]] = []
    good = []
    seen: dict[str, bool] = {}
    for index, record in enumerate(records):
        problem = _problem(record, image_folder, check_images, seen)
        if problem is None:
            # LLaVA asks whether there is an "image", not what it is.
            good.append({k: v for k, v in record.items() if k != "image"} if record.get("image") is None else record)
        else:
            problems.append((index, problem))
    if problems:
        summary = describe_problems(records, problems, source)
        if bad_samples == "error":
            raise DataError(f"{summary}\n--bad_samples skip leaves them out.")
        logger.warning("%s\nThey are left out.", summary)
    if not good:
        raise DataError(f"{source}: no usable sample is left.")
    return good


def describe_problems(records: list[Any], problems: list[tuple[int, str]], source: str) -> str:
    """A count by kind, and the first few by name."""
    kinds = Counter(text.split(":")[0] for _, text in problems)
    lines = [f"{source}: {len(problems)} of {len(records)} samples cannot be used."]
    lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
    for index, text in problems[:_SHOWN]:
        record = records[index]
        name = record.get("id", index) if isinstance(record, dict) else index
        lines.append(f"  sample {index} (id {name!r}): {text}")
    return "\n".join(lines)


def _problem(record: Any, image_folder: str | None, check_images: bool, seen: dict[str, bool]) -> str | None:
    if not isinstance(record, dict):
        return f"not an object: {str(record)[:40]!r}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "no conversations"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return "a turn without 'from' or 'value'"
        if turn["from"] not in ("human", "gpt"):
            return f"unknown speaker: {turn['from']!r} (must be human or gpt)"
    if not any(turn["from"] == "gpt" for turn in turns):
        return "no answer from gpt"
    if not any(turn["value"].split() for turn in turns):
        return "nothing but empty turns"
    markers = sum(turn["value"].count("<image>") for turn in turns)
    image = record.get("image")
    if image is None:
        return "<image> in the text but no image" if markers else None
    if not markers:
        return "an image but no <image> in the text"
    if not isinstance(image, str):
        return f"image must be one file name: {str(image)[:60]!r}"
    if markers > 1:
        return f"{markers} <image> markers for one image"
    path = os.path.join(image_folder or "", image)
    if check_images:
        if path not in seen:
            seen[path] = os.path.isfile(path)
        if not seen[path]:
            return f"missing image: {path}"
    return None


def make_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """The Trainer's data arguments: a checked data set and LLaVA's own collator."""
    return {
        "train_dataset": CheckedDataset(data_args.data_path, tokenizer, data_args),
        "data_collator": DataCollatorForSupervisedDataset(tokenizer=tokenizer),
    }
