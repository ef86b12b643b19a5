"""Samples that are left out of training by name: what `llava-compodistill check --write_skip` writes.

    {"files": [{"path": "mix665k.json", "skip": [{"index": 7, "checksum": 123, "id": "x", "why": "missing image"}]}]}

An index is the place of a sample in its file, the checksum the CRC-32 of its text there: a list for another state of
the file is refused instead of leaving out other samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hosts.files import read_json


def write_skip_list(path: str, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a list.

    Args:
        files: by path of a data file, {"index", "checksum", "id", "why"} of each sample to leave out.
    """
    content = {"files": [{"path": os.path.realpath(name), "skip": list(entries)} for name, entries in files.items()]}
    text = json.dumps(content, indent=1, ensure_ascii=True)
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--write_skip {path}: cannot be written ({error.strerror}).") from None


def read_skip_list(path: str, data_files: Sequence[str]) -> dict[str, dict[int, int]]:
    """By data file, {index: checksum} of the samples to leave out.

    A data file is found by its path or, where it has been moved, by its name.

    Raises:
        DataError: for a file that is no such list, or that is about other data.
    """
    try:
        entries = read_json(path, option="--skip_samples ")["files"]
        listed = {
            str(entry["path"]): {int(sample["index"]): int(sample["checksum"]) for sample in entry["skip"]}
            for entry in entries
        }
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"--skip_samples {path}: not a list that llava-compodistill check --write_skip has written "
            f"({type(error).__name__}: {error})."
        ) from None
    found: dict[str, dict[int, int]] = {}
    for name, samples in listed.items():
        same = [file for file in data_files if os.path.realpath(file) == name]
        same = same or [file for file in data_files if os.path.basename(file) == os.path.basename(name)]
        if len(same) != 1:
            raise DataError(f"--skip_samples {path}: {name} is none of the files of --data_path.")
        if same[0] in found:
            raise DataError(f"--skip_samples {path}: two of its files could be {same[0]} of --data_path.")
        found[same[0]] = samples
    return found
