"""A frozen model's decoder layers, run again in the backward pass instead of kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..hosts import host_of
from .patch import replaced


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside the context each decoder layer keeps its input alone for the backward pass, which may come later.

    The gradient checkpointing of transformers is for models in training mode; a teacher stays in evaluation mode.
    """
    with contextlib.ExitStack() as stack:
        for layer in host_of(model).decoder_layers(model):
            run = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            stack.enter_context(replaced(layer, "forward", run))
        yield
