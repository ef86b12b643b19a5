"""See `hosts.llava.hook`."""

from ..hosts.llava.hook import on_import

__all__ = ["on_import"]
