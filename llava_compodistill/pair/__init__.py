"""The student, its teacher, and what goes between them: adapter, encoder, layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pair import Pair

__all__ = ["Pair"]


def __getattr__(name: str) -> Any:
    """`Pair` is loaded when it is asked for: `layers`, which is index arithmetic, does without PyTorch."""
    if name == "Pair":
        from .pair import Pair

        return Pair
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
