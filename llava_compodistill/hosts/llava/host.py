"""Finding and importing the LLaVA that hosts this plugin, and saying plainly when that fails."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ... import compat
from ...errors import HostError

SUPPORTED_REVISIONS = (
    "haotian-liu/LLaVA, main branch at c121f04 (2024-05), version 1.2.2.post1",
    "llava-torch 1.2.2.post1 from the package registry",
)

INSTALL_HINT = (
    "Run inside a LLaVA checkout (git clone https://github.com/haotian-liu/LLaVA), or install the registry's copy: "
    "pip install --no-deps llava-torch==1.2.2.post1"
)


def import_llava(name: str = "llava.model") -> ModuleType:
    """Import a LLaVA module and, when that fails, show the real cause.

    `llava/model/__init__.py` swallows every exception, so that a missing dependency shows up later as "cannot import
    name LlavaLlamaForCausalLM". Importing the language model's module first brings the true error out.

    Raises:
        HostError: with the cause and the way out.
    """
    compat.prepare_for_llava()
    try:
        # `llava/__init__.py` imports the model package, so this line is where a broken install shows.
        importlib.import_module("llava.constants")
        importlib.import_module("llava.model.language_model.llava_llama")
        return importlib.import_module(name)
    except ImportError as error:
        raise HostError(_explain(error)) from error


def import_llava_train() -> ModuleType:
    """`llava.train.train`, importable on every supported transformers."""
    return import_llava("llava.train.train")


def _explain(error: ImportError) -> str:
    if error.name == "llava":
        return f"LLaVA was not found. {INSTALL_HINT}"
    cause = _real_cause() or error
    return f"LLaVA was found but cannot be imported: {cause}. Supported: {'; '.join(SUPPORTED_REVISIONS)}."


def _real_cause() -> Exception | None:
    """The exception behind `except: pass` in llava/model/__init__.py, if it can be provoked again."""
    import sys

    saved = {name: module for name, module in sys.modules.items() if name == "llava" or name.startswith("llava.")}
    for name in saved:
        del sys.modules[name]
    spec = importlib.util.find_spec("llava")
    try:
        if spec is None or not spec.submodule_search_locations:
            return None
        # A bare package object in place of llava/__init__.py lets the submodule import run by itself.
        for package, folder in (("llava", ""), ("llava.model", "/model")):
            bare = ModuleType(package)
            bare.__path__ = [spec.submodule_search_locations[0] + folder]
            sys.modules[package] = bare
        importlib.import_module("llava.model.language_model.llava_llama")
    except Exception as error:  # whatever LLaVA's own bare `except` would have hidden
        return error
    finally:
        for name in [name for name in sys.modules if name == "llava" or name.startswith("llava.")]:
            del sys.modules[name]
        sys.modules.update(saved)
    return None
