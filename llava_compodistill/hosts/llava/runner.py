"""`llava-compodistill run <module> …`: any LLaVA module as __main__, with the plugin registered.

LLaVA's eval modules hard-code `device="cuda"` and half precision for their inputs. On a machine without CUDA both are
redirected while the module runs, so that the unmodified module works there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from ...errors import RunnerError

USAGE = """usage: llava-compodistill run <module> [arguments of the module]

Registers the plugin, then runs a LLaVA module as `python -m` would:
  llava-compodistill run llava.eval.model_vqa_loader --model-path ... --question-file ..."""

NOTICE = (
    "llava-compodistill run: this machine has no CUDA device; the module's hard-coded cuda and float16 are redirected "
    "to cpu and float32."
)


def _redirect(value: Any) -> Any:
    """A device or dtype argument as this machine can have it; anything else unchanged."""
    if value is torch.float16:
        return torch.float32
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class CudaToCpu(TorchFunctionMode):
    """While active, tensors asked to be on CUDA or in half precision are on the CPU in single precision.

    Modules are covered too: `nn.Module.to/cuda/half` go through the same calls for each of their tensors. bfloat16 is
    left alone, CPUs have it.
    """

    #: These give bytes another reading, as safetensors does with those of a file: their dtype is a fact.
    _READINGS = frozenset({torch.Tensor.view, torch.frombuffer, torch.from_file})
    _MOVES = frozenset({torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.half, torch.Tensor.type})

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in self._MOVES:
            return self._move(func, args, kwargs or {})
        if func not in self._READINGS and kwargs and ("device" in kwargs or "dtype" in kwargs):
            kwargs = {name: _redirect(v) if name in ("device", "dtype") else v for name, v in kwargs.items()}
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _move(func: Callable, args: tuple, kwargs: dict) -> Any:
        tensor, *rest = args
        if func is torch.Tensor.cuda:
            # What goes to the GPU runs there in the precision it has; half precision has to become single here.
            return tensor.float() if tensor.dtype is torch.float16 else tensor
        if func is torch.Tensor.half:
            return tensor.float()
        if func is torch.Tensor.type:
            kind = rest[0] if rest else kwargs.get("dtype")
            if isinstance(kind, str):
                kind = kind.replace(".cuda.", ".").replace("HalfTensor", "FloatTensor")
            return func(tensor) if kind is None else func(tensor, _redirect(kind))
        asked_for_cuda = any(_redirect(v) is not v and v is not torch.float16 for v in (*rest, *kwargs.values()))
        result = func(tensor, *map(_redirect, rest), **{name: _redirect(v) for name, v in kwargs.items()})
        return result.float() if asked_for_cuda and result.dtype is torch.float16 else result


#: torch.cuda functions that raise without a device, and what a script may see instead.
_CUDA_STUBS: dict[str, Callable[..., Any]] = {
    "synchronize": lambda *_, **__: None,
    "set_device": lambda *_, **__: None,
    "current_device": lambda *_, **__: 0,
    "get_device_name": lambda *_, **__: "cpu",
    "reset_peak_memory_stats": lambda *_, **__: None,
    "mem_get_info": lambda *_, **__: (0, 0),
}


@contextlib.contextmanager
def redirect_cuda() -> Iterator[None]:
    """On a machine without CUDA, send CUDA and float16 requests to the CPU and float32 within this context."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, stub in _CUDA_STUBS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(CudaToCpu())
        yield


def check_module(module: str) -> None:
    """Raise RunnerError when `module` cannot be found, without running it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        # The parent package is imported on the way, so the culprit may be one of its own dependencies.
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise RunnerError(f"{module} needs the package {error.name}, which is not installed.") from error
        spec = None
    except ValueError as error:
        raise RunnerError(f"{module!r} is no module name: {error}. Write it with dots, without .py.") from error
    if spec is None:
        hint = f" Did you mean {_dotted(module)}?" if "/" in module or module.endswith(".py") else ""
        raise RunnerError(
            f"There is no module {module!r}.{hint} LLaVA is looked for in this folder ({os.getcwd()}) and among the "
            "installed packages; evaluation lives in llava.eval (for example llava.eval.model_vqa_loader)."
        )


def _open_by_lines(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
    """`open` as the module sees it: a text that it writes reaches the disk line by line, so that a kill loses no
    answers. LLaVA's modules leave theirs in a buffer of some fifty lines."""
    if buffering == -1 and "b" not in mode and set(mode) & set("wax+"):
        buffering = 1
    return open(file, mode, buffering, *args, **kwargs)


def opening_images(module: str) -> contextlib.AbstractContextManager:
    """In here one of LLaVA's evaluation modules, which import PIL afresh, opens images as the plugin does."""
    if not module.startswith("llava.eval"):
        return contextlib.nullcontext()
    from PIL import Image

    from .images import as_llava_opens

    return mock.patch.object(Image, "open", as_llava_opens)


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removeprefix("./").replace("/", ".")


def _check_template(arguments: Sequence[str]) -> None:
    """A wrong --conv-mode is a KeyError in LLaVA, from a worker process, after the model is loaded."""
    from .templates import use_template

    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag in ("--conv-mode", "--conv_mode"):
            use_template(value)


def run(module: str, arguments: Sequence[str]) -> None:
    """Register the plugin and run `module` as `__main__` with these command-line arguments.

    Worker processes of a DataLoader see the module's globals, because on Linux they are forked from this process.

    Raises:
        RunnerError: when the module does not exist.
        TemplateError: when --conv-mode names no template.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a LLaVA checkout need not be installed
    from . import register

    register(train=module.startswith("llava.train"))
    check_module(module)
    _check_template(arguments)
    if not torch.cuda.is_available():
        print(NOTICE, file=sys.stderr, flush=True)
    with redirect_cuda(), opening_images(module), mock.patch.object(sys, "argv", [module, *arguments]):
        runpy.run_module(module, {"open": _open_by_lines}, run_name="__main__", alter_sys=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill run`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    run(argv[0], argv[1:])
    return 0
