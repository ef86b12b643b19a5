"""What a patched LLaVA checkout calls at the end of `llava/__init__.py` (see patches/*-plugin-hook.patch)."""

from __future__ import annotations

import sys

_running = False


def on_import() -> None:
    """Register the plugin, unless it is the plugin that is importing LLaVA right now.

    `import llava` gets here; so does every plugin module that imports LLaVA while it is itself being loaded. Such a
    module cannot be used by `register()` yet, and whoever imports it registers by himself.
    """
    global _running
    if _running or any(_is_loading(name) for name in list(sys.modules) if name.startswith(__package__)):
        return
    from . import register

    _running = True
    try:
        register()
    finally:
        _running = False


def _is_loading(name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))
