"""The benchmarks by name. Each is one file of this folder, or a module of yours: see README.md beside this file."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from typing import TypeVar

from ...errors import DataError
from .base import Benchmark

#: Modules that register further benchmarks, separated by commas.
VARIABLE = "COMPODISTILL_BENCHMARKS"
#: Order of the tables: the paper's. Benchmarks that are not named here follow in the order they were registered.
ORDER = (
    "sugarcrepe", "sade", "bivlc", "winoground", "rbench", "rbench-box", "rbench-mask", "reefknot",
    "vqav2", "gqa", "vizwiz", "textvqa", "mme", "pope",
)  # fmt: skip
_registry: dict[str, Benchmark] = {}
B = TypeVar("B", bound=Benchmark)


def register(benchmark: B) -> B:
    """Make a benchmark known to `eval`, `compare` and the tables; returns it.

    Raises:
        DataError: when another benchmark has its name, or the name is none for a file.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", benchmark.name):
        raise DataError(f"benchmark {benchmark.name!r}: its name must be of small letters, digits, - and _.")
    if _registry.setdefault(benchmark.name, benchmark) is not benchmark:
        raise DataError(f"benchmark {benchmark.name!r}: there is another one of this name.")
    return benchmark


def registered(kind: type[B] = Benchmark) -> dict[str, B]:
    """{name: benchmark} of a kind, in the order of the tables: the files of this folder, and what the modules in
    COMPODISTILL_BENCHMARKS register.

    Raises:
        DataError: for a module that cannot be imported.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DataError(
                f"{VARIABLE}: {name} cannot be imported ({error}). Is its folder on PYTHONPATH?"
            ) from error
    names = [*(name for name in ORDER if name in _registry), *(name for name in _registry if name not in ORDER)]
    return {name: _registry[name] for name in names if isinstance(_registry[name], kind)}


def get(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        DataError: when there is none.
    """
    known = registered()
    if name not in known:
        raise DataError(f"benchmark {name!r}: there are {', '.join(known)}; {VARIABLE} names modules with others.")
    return known[name]
