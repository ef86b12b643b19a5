"""The student, its teacher, and what goes between them: adapter, encoder, layers."""

from .pair import Pair

__all__ = ["Pair"]
