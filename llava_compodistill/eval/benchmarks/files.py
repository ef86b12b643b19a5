"""Reading and checking benchmarks' local files, before any model is loaded. Every message names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, MissingData
from .base import Item

#: At most so many missing images are named.
_NAMED = 3


def read_json(path: Path, how_to_get: str) -> Any:
    """A JSON file.

    Raises:
        MissingData: when it is not there.
        DataError: when it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {how_to_get}") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}).") from None


def read_object(path: Path, how_to_get: str) -> dict[str, Any]:
    """A JSON file's object of items; a list is numbered.

    Raises:
        MissingData, DataError: as `read_json`, and for anything else.
    """
    entries = read_json(path, how_to_get)
    if isinstance(entries, list):  # some copies hold a list
        return {str(number): entry for number, entry in enumerate(entries)}
    if not isinstance(entries, dict):
        raise DataError(f"{path}: must hold an object of items, is a {type(entries).__name__}.")
    return entries


def read_lines(path: Path, how_to_get: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of each line of a JSON-lines file.

    Raises:
        MissingData: when it is not there.
        DataError: for a line that is no object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {how_to_get}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: no JSON ({error}).") from None
        if not isinstance(entry, dict):
            raise DataError(f"{place}: must be an object, is a {type(entry).__name__}.")
        yield place, entry


def value(entry: Any, name: str, place: str) -> Any:
    """A field of an entry. Raises DataError when it has none; so do the others."""
    if not isinstance(entry, dict) or name not in entry:
        has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{place}: has no {name!r}, only {has}.")
    return entry[name]


def text(entry: Any, name: str, place: str) -> str:
    """A field that is a text, and not blank."""
    found = value(entry, name, place)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{place}: {name} must be a text, is {found!r}.")
    return found


def texts(entry: Any, name: str, place: str) -> list[str]:
    """A field that is a list of texts, none of them blank."""
    found = value(entry, name, place)
    if not isinstance(found, list) or not all(isinstance(part, str) and part.strip() for part in found):
        raise DataError(f"{place}: {name} must be a list of texts, is {found!r}.")
    return found


def yes_no_label(entry: Any, place: str) -> str:
    """The field `label`: yes or no, in small letters."""
    label = str(value(entry, "label", place)).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{place}: label {entry['label']!r} must be yes or no.")
    return label


def image_folder(benchmark: str, how_to_get: str, *folders: Path) -> Path:
    """The first of the folders that exists.

    Raises:
        MissingData: when none does.
    """
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = ", ".join(map(str, folders))
    raise MissingData(f"the images of {benchmark} are in none of {looked}: {how_to_get}")


def checked(items: Sequence[Item], benchmark: str, how_to_get: str) -> list[Item]:
    """The items, if there are any, every image is there and no id stands for two.

    Raises:
        DataError: naming the items.
    """
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(f"{item.place}: the id {item.id!r} is that of {seen[item.id]} already.")
        seen[item.id] = item.place
    files = {image: item.place for item in reversed(items) for image in item.images}
    missing = {file: place for file, place in reversed(files.items()) if not Path(file).is_file()}
    if missing:
        named = "; ".join(f"{file} of {place}" for file, place in list(missing.items())[:_NAMED])
        more = "; …" if len(missing) > _NAMED else ""
        raise DataError(
            f"{benchmark}: {len(missing)} of {len(files)} images are missing ({named}{more}): {how_to_get}"
        )
    if not items:
        raise DataError(f"{benchmark}: there are no items.")
    return list(items)
