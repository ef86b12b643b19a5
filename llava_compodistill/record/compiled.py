"""Decoder layers compiled one by one, in place (--compile_layers).

The compiled code is a layer's own forward and nothing around it: hooks, and what wraps the model later (DDP), call it
as they call any forward. All layers of a model are compiled once, since they run the same code. A tapped layer's
attention, with its tap, runs uncompiled between the two compiled halves of the layer.

Gradient checkpointing calls a layer's forward anew in the backward pass and needs the same code there. PyTorch looks
compiled code up by the code object of a function, the latest used first, and the first half of a tapped layer fits
any layer: a layer without a tap would get the halves the second time. So forwards with a tap have a code object of
their own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..errors import FlagError
from ..hosts import host_of
from .patch import replaced
from .taps import is_tapped, uncompiled_taps

#: What compiles. (Tests take others that need no C++ compiler.)
BACKEND = "inductor"


@contextlib.contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside the context a model's decoder layers are compiled at their first call, and again for other sizes: the
    second length of a sequence gets code for all lengths.

    Args:
        model: a multimodal causal language model (not a wrapper around one), with or without gradient checkpointing.
    """
    import torch._dynamo  # a second that other runs need not wait for

    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled_taps())
        # A layer's forward is met in student and teacher, tapped or not, with and without a graph, in one length and
        # in any: more cases than the default of 8, after which it would no longer be compiled.
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=64))
        layers = host_of(model).decoder_layers(model)
        with_tap = {kind: _another(kind.forward) for kind in {type(layer) for layer in layers}}
        for layer in layers:
            untapped = torch.compile(layer.forward, backend=BACKEND)
            tapped = torch.compile(types.MethodType(with_tap[type(layer)], layer), backend=BACKEND)
            stack.enter_context(replaced(layer, "forward", functools.partial(_forward, layer, untapped, tapped)))
        yield


def _forward(layer: nn.Module, untapped: Callable, tapped: Callable, *args, **kwargs):
    chosen = tapped if any(map(is_tapped, layer.children())) else untapped
    return chosen(*args, **kwargs)


def _another(forward: Callable) -> Callable:
    """The same function with a code object of its own. (What wraps a layer's forward in some releases of transformers
    renames arguments that nobody gives any more.)"""
    inner = inspect.unwrap(forward)
    code = inner.__code__.replace(co_name=f"{inner.__code__.co_name}_with_tap")
    same = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    same.__kwdefaults__ = inner.__kwdefaults__
    return same


def refuse_without_compiler(flag: str, device: torch.device) -> None:
    """Compile a function of one line, to see whether anything can be compiled here. It takes seconds.

    Raises:
        FlagError: naming the flag, what the compiler said and the way out.
    """
    try:
        torch.compile(_anything, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # what a compiler may raise is its own affair
        said = " ".join(str(error).split())
        needed = "Triton" if device.type == "cuda" else "a C++ compiler (g++ or clang)"
        raise FlagError(
            f"{flag}: PyTorch {torch.__version__} cannot compile here ({type(error).__name__}: {said[:300]}). Install "
            f"{needed}, or leave the flag out."
        ) from error


def _anything(values: torch.Tensor) -> torch.Tensor:
    return values.sin() * 2 + 1
