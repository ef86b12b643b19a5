"""Finds what would make the CPU wait for a GPU, on a machine without one.

A GPU runs behind the CPU: whatever asks for a value, or has a size that depends on one, waits until all that is queued
is done. Here every tensor stands for a device's, but for those that are known to lie in the CPU's memory and what is
made of them alone, until `hosts.base.sent` puts it on the device.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_compodistill.hosts import base

aten = torch.ops.aten
#: Operators that give a value to the CPU, or a result whose size is a value.
_ASK = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
#: Operators by which numbers of Python's come into a tensor.
_NUMBERS = {aten.lift_fresh.default, aten.fill_.Tensor, aten.copy_.default}
#: Methods that read a CPU's tensor without any operator.
_READ = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class Waits:
    """What has waited, inside `counting`.

    Attributes:
        places: by "file: function: operator", how often; files are named below their package's folder.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._made_here: dict[
            int, bool
        ] = {}  # by storage: True of a batch in the CPU's memory, False of numbers alone
        self._lists: set[int] = set()  # storages of lists of Python's
        self._alive: list[torch.Tensor] = []  # so that no storage comes again as another's

    def on_cpu(self, tensors: Iterable[torch.Tensor]) -> None:
        """These lie in the CPU's memory."""
        for tensor in tensors:
            self._mark(tensor, True)

    @contextlib.contextmanager
    def counting(self, monkeypatch: Any) -> Iterator[Waits]:
        """In here waits are counted."""
        original = base.sent

        def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            there = tensor.clone()
            self._made_here.pop(_storage(there), None)
            return there

        with monkeypatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("llava_compodistill") and getattr(module, "sent", None) is original:
                    patch.setattr(module, "sent", sent)
            with _Functions(self), _Operators(self):
                yield self

    def of_python(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a list of Python's."""
        return _storage(tensor) in self._lists

    def asked(self, what: str, subjects: Iterable[Any]) -> None:
        """Count a question about tensors, unless it can be answered on the CPU."""
        tensors = [value for value in subjects if torch.is_tensor(value)]
        if any(_storage(tensor) not in self._made_here for tensor in tensors):
            self.places[f"{_place()}: {what}"] += 1

    def follow(self, function: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Where results lie: on the device, if any input does."""
        marks = [self._made_here.get(_storage(tensor)) for tensor in inputs]
        if function is aten.lift_fresh.default:
            self._lists |= set(map(_storage, outputs))
            self._alive += outputs
        if function in _NUMBERS and marks[-1] is None and (inputs[-1].ndim == 0 or len(inputs) == 1):
            marks[-1] = False
        for output in outputs:
            if None in marks:
                self._made_here.pop(_storage(output), None)
            else:
                self._mark(output, any(marks))

    def _mark(self, tensor: torch.Tensor, batch: bool) -> None:
        self._made_here[_storage(tensor)] = batch
        self._alive.append(tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str:
    """The innermost function of the package, of LLaVA or of transformers."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("llava_compodistill", "llava", "transformers", "accelerate"):
            parts = Path(frame.filename).parts
            if package in parts:
                place = len(parts) - 1 - parts[::-1].index(package)
                return f"{'/'.join(parts[place:])}: {frame.name}"
    return "elsewhere"


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READ:
            self.waits.asked(function.__name__, args[:1])
        if function is torch.Tensor.cpu:
            copy = args[0].clone()
            self.waits.on_cpu([copy])
            return copy
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        name = function.name().removeprefix("aten::")
        if function in _ASK:
            self.waits.asked(name, inputs)
        elif function in _INDEX:
            if any(self.waits.of_python(index) for index in args[1] if index is not None):
                self.waits.asked(f"{name} with a list", args[:1])  # which is copied there, at once
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            filled = len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1  # becomes masked_fill
            if masks and not filled:
                self.waits.asked(f"{name} with a mask", masks)
        result = function(*args, **kwargs)
        self.waits.follow(function, inputs, [value for value in tree_leaves(result) if torch.is_tensor(value)])
        return result
