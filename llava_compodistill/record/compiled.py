"""Decoder layers compiled one by one, in place (--compile_layers).

The compiled code is a layer's own forward and nothing around it: hooks, and what wraps the model later (DDP), call it
as they call any forward. All layers of a model are compiled once, since they run the same code. A tapped layer's
attention, with its tap, runs uncompiled between the two compiled halves of the layer.

Not under gradient checkpointing: transformers calls a layer's forward anew in the backward pass, and what the compiled
one keeps the second time is not what it kept the first (PyTorch 2.13: CheckpointError).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import FlagError
from ..hosts import host_of
from .patch import replaced
from .taps import uncompiled_taps

#: What compiles. (Tests take others that need no C++ compiler.)
BACKEND = "inductor"


@contextlib.contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside the context a model's decoder layers are compiled at their first call, and again for other sizes: the
    second length of a sequence gets code for all lengths.

    Args:
        model: a multimodal causal language model (not a wrapper around one), without gradient checkpointing.
    """
    import torch._dynamo  # a second that other runs need not wait for

    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled_taps())
        # A layer's forward is met in student and teacher, tapped or not, with and without a graph, in one length and
        # in any: more cases than the default of 8, after which it would no longer be compiled.
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=64))
        for layer in host_of(model).decoder_layers(model):
            stack.enter_context(replaced(layer, "forward", torch.compile(layer.forward, backend=BACKEND)))
        yield


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
