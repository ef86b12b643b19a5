"""Small files that people and other programs write: text, JSON and YAML, read in one way.

Whatever may be wrong with such a file (a folder in its place, bytes that are no UTF-8, nesting without end, numbers of
thousands of digits, NaN, a name that stands twice) is one clear error that names it. A byte order mark is passed over.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import CompoDistillError, DataError

Name = str | os.PathLike
_DEEP = "it is nested too deeply"


class _Refused(ValueError):
    """What Python's parsers would accept, and JSON or YAML do not have."""


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder: the hub's have no more than one slash, and begin with a letter."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def half_a_character(text: str) -> bool:
    """Whether a text holds a lone surrogate: JSON can (`"\\ud83d"`), and neither UTF-8 nor a tokenizer takes it."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def read_text(path: Name, error: type[CompoDistillError] = DataError, option: str = "") -> str:
    """A file's text.

    Args:
        error: the kind to raise.
        option: what messages say before the file's name: the flag that names it, and a space.

    Raises:
        error: when it is not there, a folder, not ours to read, or no UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise error(f"{option}{path}: there is no such file.") from None
    except (OSError, ValueError) as reason:  # ValueError: a name that no file can have
        raise error(f"{option}{path}: {getattr(reason, 'strerror', None) or reason}.") from None
    return decode(data, f"{option}{path}", error)


def decode(data: bytes, place: Any, error: type[CompoDistillError] = DataError, errors: str = "strict") -> str:
    """The text of UTF-8 bytes.

    Args:
        place: what the message begins with.
        errors: "replace" for texts that others have cut off somewhere.
    """
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as reason:
        raise error(f"{place}: no UTF-8 text ({reason}).") from None


def parse_json(text: str | bytes, place: Any, error: type[CompoDistillError] = DataError) -> Any:
    """What a JSON text holds.

    Args:
        place: what the message begins with: the file, and the line of a file of lines.

    Raises:
        error: for anything that JSON does not have. (Python itself takes NaN, Infinity, and the last of two values.)
    """
    if isinstance(text, bytes):
        text = decode(text, place, error)
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_name_twice)
    except json.JSONDecodeError as reason:
        where = f"line {reason.lineno}, " if "\n" in text.strip() else ""
        raise error(f"{place}: no JSON ({reason.msg}, {where}column {reason.colno}).") from None
    except _Refused as reason:
        raise error(f"{place}: no JSON ({reason}).") from None
    except RecursionError:
        raise error(f"{place}: no JSON that can be read ({_DEEP}).") from None
    except ValueError as reason:  # int() of more digits than Python converts
        raise error(f"{place}: no JSON that can be read ({reason}).") from None


def read_json(path: Name, error: type[CompoDistillError] = DataError, option: str = "") -> Any:
    """What a JSON file holds. Raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, error, option), f"{option}{path}", error)


def read_object(path: Name, error: type[CompoDistillError] = DataError) -> dict[str, Any]:
    """The object that a JSON file holds; anything else is an error, too."""
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path}: must hold a JSON object, is {_kind(content)}.")
    return content


def read_yaml(path: Name, error: type[CompoDistillError] = DataError, option: str = "") -> Any:
    """What a YAML file holds, without anything that YAML would run or make.

    Raises:
        error: as `read_text`, and for anything that is no YAML or stands twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader to which a name that stands twice is an error, as it is to YAML."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            named = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            _refuse_twice(named)
            return super().construct_mapping(node, deep)

    text = read_text(path, error, option)
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise error(f"{option}{path}: no YAML that can be read ({_DEEP}).") from None
    except (yaml.YAMLError, ValueError, TypeError) as reason:  # dates and numbers that are none, names of no kind
        raise error(f"{option}{path}: not valid YAML ({reason}).") from None


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is no number of JSON")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse_twice([name for name, _ in pairs])
    return found


def _refuse_twice(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _Refused(f"the name {name!r} stands twice in one object")
        seen.add(name)


def _kind(content: Any) -> str:
    return {"NoneType": "null", "list": "a list", "str": "a text"}.get(type(content).__name__, f"{content!r:.40}")
