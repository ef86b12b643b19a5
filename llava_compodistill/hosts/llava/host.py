"""Finding and importing the LLaVA that hosts this plugin, and saying plainly when that fails."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

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
    from ... import compat

    if name.startswith("llava.train"):
        compat.prepare_for_llava_train()
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


def import_llava_scorer(name: str) -> ModuleType:
    """One of LLaVA's modules that count answers (`llava.eval.m4c_evaluator`), without torch, transformers and the
    models, which LLaVA's own `__init__.py` imports: they take seconds, and counting needs none of them.

    Raises:
        HostError: with the cause and the way out.
    """
    with _bare_packages():
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error.name == "llava"
            raise HostError(_not_found() if missing else f"LLaVA's {name} cannot be imported: {error}.") from error


def _explain(error: ImportError) -> str:
    if error.name == "llava":
        return _not_found()
    cause = _real_cause() or error
    return f"LLaVA was found but cannot be imported: {cause}. Supported: {'; '.join(SUPPORTED_REVISIONS)}."


def _not_found() -> str:
    return f"LLaVA was not found. {INSTALL_HINT}"


def _real_cause() -> Exception | None:
    """The exception behind `except: pass` in llava/model/__init__.py, if it can be provoked again."""
    with _bare_packages():
        try:
            importlib.import_module("llava.model.language_model.llava_llama")
        except Exception as error:  # whatever LLaVA's own bare `except` would have hidden
            return error
    return None


@contextlib.contextmanager
def _bare_packages() -> Iterator[None]:
    """In here LLaVA's modules are imported afresh, and its packages' __init__.py, which import the models, do not run.
    Afterwards sys.modules holds what it held before."""
    saved = {name: module for name, module in sys.modules.items() if _is_llava(name)}
    try:
        spec = importlib.util.find_spec("llava")
        for name in saved:
            del sys.modules[name]
        root = spec.submodule_search_locations[0] if spec is not None and spec.submodule_search_locations else None
        for package, folder in (("llava", ""), ("llava.model", "/model")) if root else ():
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [root + folder]
        yield
    finally:
        for name in [name for name in sys.modules if _is_llava(name)]:
            del sys.modules[name]
        sys.modules.update(saved)


def _is_llava(name: str) -> bool:
    return name == "llava" or name.startswith("llava.")
