"""Reading and checking benchmarks' local files, before any model is loaded. Every message names file and line."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, MissingData
from ...hosts.files import decode, parse_json
from .base import Item

#: At most so many missing images are named.
_NAMED = 3
#: Of a folder with more files than this, one hash is noted.
_MANY = 12
_noted: contextvars.ContextVar[dict[Path, str] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, str]]:
    """In here what is read is noted: file -> 16 hex digits of its SHA-256."""
    found: dict[Path, str] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text, noted.

    Raises:
        FileNotFoundError: when it is not there.
        DataError: when it is no UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a folder, not ours to read, or a name that no file has
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}.") from None
    found = _noted.get()
    if found is not None:
        found[path] = hashlib.sha256(data).hexdigest()[:16]
    return decode(data, path, errors=errors)


def named_below(root: Path, found: Mapping[Path, str]) -> dict[str, str]:
    """What `noted` found as {path below the root: hash}; of a folder with many files {folder/*.suffix: one hash}."""
    many: dict[str, list[str]] = defaultdict(list)
    for path in sorted(found):
        many[f"{Path(os.path.relpath(path.parent, root)).as_posix()}/*{path.suffix}"].append(found[path])
    named = {}
    for path in sorted(found):
        name = Path(os.path.relpath(path, root)).as_posix()
        group = f"{Path(name).parent.as_posix()}/*{path.suffix}"
        if len(many[group]) > _MANY:
            named[group] = hashlib.sha256("".join(many[group]).encode()).hexdigest()[:16]
        else:
            named[name] = found[path]
    return named


def read_json(path: Path, how_to_get: str) -> Any:
    """A JSON file.

    Raises:
        MissingData: when it is not there.
        DataError: when it is no JSON.
    """
    try:
        content = read_text(path)
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {how_to_get}") from None
    return parse_json(content, path)


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
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        raise MissingData(f"{path} is missing: {how_to_get}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        entry = parse_json(line, place)
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


def home(data: Path, name: str) -> Path:
    """The folder of a benchmark below the data root: NAME, or what a clone or download of it is called (R-Bench,
    sugar-crepe-main); DATA/NAME where there is none."""
    if (data / name).is_dir() or not data.is_dir():
        return data / name
    found = sorted(folder for folder in data.iterdir() if folder.is_dir() and _plain(folder.name) == _plain(name))
    return found[0] if found else data / name


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", re.sub(r"-(main|master)$", "", name.lower()))


def folder_with(file: str, folder: Path, *parts: str) -> Path:
    """The folder, or the first of its parts, in which a file lies; the folder where there is none."""
    return next((place for place in (folder, *(folder / part for part in parts)) if (place / file).exists()), folder)


def image_folder(benchmark: str, how_to_get: str, *folders: Path, sample: Any = None) -> Path:
    """The first of the folders in which an image lies, else the first that exists.

    Args:
        sample: the name of one of the images.

    Raises:
        MissingData: when none exists.
    """
    there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    if not there:
        raise MissingData(f"the images of {benchmark} are in none of {', '.join(map(str, folders))}: {how_to_get}")
    if not isinstance(sample, str):
        return there[0]
    return next((folder for folder in there if os.path.isfile(folder / sample)), there[0])


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
    files = {str(image): item.place for item in reversed(items) for image in item.images}
    # os.path: a name that is too long for the system is not there, and no error.
    missing = {file: place for file, place in reversed(files.items()) if not os.path.isfile(file)}
    if missing:
        named = "; ".join(f"{file} of {place}" for file, place in list(missing.items())[:_NAMED])
        more = "; …" if len(missing) > _NAMED else ""
        raise DataError(
            f"{benchmark}: {len(missing)} of {len(files)} images are missing ({named}{more}): {how_to_get}"
        )
    if not items:
        raise DataError(f"{benchmark}: there are no items.")
    return list(items)
