"""Putting something in a method's place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_ABSENT = object()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Inside the context `owner.name` is `value`; leaving it puts back what the instance had, or nothing where it had
    none. (accelerate hangs its hooks for quantised and offloaded modules on the instance, too.)

    Yields:
        What stood there before.
    """
    before = vars(owner).get(name, _ABSENT)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield original
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
