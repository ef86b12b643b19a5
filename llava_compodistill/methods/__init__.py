"""The methods by name. Adding one is one file and a line here, or `--method package.module:Name` from outside."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .base import Method, Sums, Term

#: name -> (module here, class)
METHODS = {
    "sft": ("sft", "SFT"),
    "kd": ("kd", "KD"),
    "compodistill": ("compodistill", "CompoDistill"),
    "release": ("release", "Release"),
    "llava_kd": ("llava_kd", "LLaVAKD"),
    "llavadi": ("llavadi", "LLaVADI"),
    "llava_mod": ("llava_mod", "LLaVAMoD"),
    "align_kd": ("align_kd", "AlignKD"),
    "switch_kd": ("switch_kd", "SwitchKD"),
}

__all__ = ["METHODS", "Method", "Sums", "Term", "find_method"]


def find_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of a name, or of `package.module:Name` for a subclass of `Method` from elsewhere.

    Args:
        options: of the method, see its `defaults`.

    Raises:
        ValueError: for an unknown name or option, or an address where there is no method.
    """
    if name in METHODS:
        module, attribute = METHODS[name]
        return getattr(importlib.import_module(f".{module}", __name__), attribute)(options)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"--method {name}: must be one of {', '.join(METHODS)}, or package.module:Name.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--method {name}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"--method {name}: {attribute} is no subclass of llava_compodistill.methods.Method.")
    return found(options)
