"""Everything that touches LLaVA. `register()` makes an installed or checked-out LLaVA know the plugin.

The names below are loaded when they are first used: patching a checkout needs no transformers.
"""

from __future__ import annotations

import importlib

_LAZY = {
    "HostError": "host",
    "import_llava": "host",
    "register": "registration",
    "registered": "registration",
    "unregister": "registration",
}

__all__ = [*_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
