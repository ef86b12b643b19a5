"""In which layers does a model read the image? Take the image from a layer's sight and see what is lost.

VAT aligns attention in the layers where the teacher turns to the image. The paper finds them in the middle of large
language models (Section 3); a model of another make may have them elsewhere, and then `--student_layers` and
`--teacher_layers` should say so, or leave it to what is measured here (`sight`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import compat
from ..hosts.llava.model import llava_core
from .attention import attention_modules
from .costs import Inside, answer_costs
from .encoding import keep_tokens
from .merge import MergedBatch
from .padding import owners, unpadded
from .patch import replaced

T = TypeVar("T")


@contextlib.contextmanager
def without_sight(model: nn.Module, layers: Sequence[int], batch: Callable[[], MergedBatch]) -> Iterator[None]:
    """In these layers, text queries attend to text alone; visual tokens still attend to each other.

    A backend that takes no mask of scores (FlashAttention) goes on in the other layers; these run SDPA.

    Args:
        model: a LLaVA model.
        layers: 0-based numbers of the layers.
        batch: gives the merged batch of the running forward (`MergeRecorder.batch`).

    Raises:
        ValueError: for a layer that the model lacks.
    """
    core = llava_core(model)
    modules = attention_modules(core)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"Layer {layer}: the model has layers 0 to {len(modules) - 1}.")
    takes_mask = compat.attention_implementation(core) in ("eager", "sdpa")

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, {**kwargs, "attention_mask": _mask(batch(), hidden)}

    with contextlib.ExitStack() as stack:
        for layer in layers:
            if not takes_mask:
                stack.enter_context(_by_sdpa(modules[layer]))
            handle = modules[layer].register_forward_pre_hook(hide, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def blind_in(model: nn.Module, layers: Sequence[int]) -> Inside:
    """`without_sight` as the context that `answer_costs` and the engine for whole sequences take as `inside`."""
    return lambda recorder: without_sight(model, layers, lambda: recorder.batch)


def by_layer(
    model: nn.Module, measure: Callable[[Inside], T], layers: Iterable[int] | None = None
) -> tuple[T, list[T]]:
    """What is measured with the whole model, and with text blind to the image in each layer alone.

    Args:
        measure: runs the model inside the context that it is given.
        layers: all layers when None.
    """
    layers = range(len(attention_modules(llava_core(model)))) if layers is None else layers
    return measure(blind_in(model, [])), [measure(blind_in(model, [layer])) for layer in layers]


@torch.no_grad()
def sight_by_layer(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """[samples][layers]: what a sample's answers cost more when text does not see the image in one layer alone, in
    nats an answer token. Samples without an image, or whose answers are cut off, are left out.

    For each batch there is one forward of the whole model and one a layer; its images are encoded once.

    Args:
        model: a LLaVA model in evaluation mode, without wrappers.
        batches: what LLaVA's collator gives, on the model's device.
    """
    found: list[list[float]] = []
    for inputs in batches:
        with keep_tokens(model):
            (whole, merged), blind = by_layer(model, functools.partial(answer_costs, model, inputs))
        sums = torch.stack([costs[:, 0] for costs, _ in blind], dim=1).double() - whole[:, :1].double()
        counts = merged.has_image & (whole[:, 1] > 0)
        found += (sums[counts] / whole[counts, 1:].double()).tolist()
    return found


@contextlib.contextmanager
def _by_sdpa(module: nn.Module) -> Iterator[None]:
    """Inside the context one attention module computes by SDPA, whatever its model's backend."""
    if compat.ALL_ATTENTION_FUNCTIONS is not None:
        config = copy.copy(module.config)  # the model's own stays, and with it the masks that the other layers get
        config._attn_implementation = "sdpa"
        with replaced(module, "config", config):
            yield
        return
    # Before 4.48 a backend is a class, all over the same weights. A family that has none for SDPA has one for eager.
    source = vars(sys.modules[type(module).__module__])
    classes = next(value for name, value in source.items() if name.endswith("_ATTENTION_CLASSES"))
    kind = classes.get("sdpa", classes["eager"])
    with replaced(module, "forward", functools.partial(kind.forward, module)):
        yield


def _mask(batch: MergedBatch, hidden: torch.Tensor) -> torch.Tensor:
    """[B, 1, N, N], added to the scores: causal, no padding, and nothing visual for text queries; [1, 1, T, T] where
    the layers run without padding."""
    length, owner = hidden.shape[1], owners(batch)
    if hidden.shape[:2] == batch.real.shape:
        visual, same = batch.visual, batch.real[:, None, :]
    else:
        visual, same = unpadded(batch.visual, batch), (owner[:, None] == owner)[None]
    allowed = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    allowed = allowed & same & (visual[:, :, None] | ~visual[:, None, :])
    # A row without any key would be NaN; padding rows, which nobody reads, see themselves.
    allowed |= torch.eye(length, dtype=torch.bool, device=hidden.device)
    smallest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, smallest)[:, None]
