"""The code bases that a model can come from. Today: LLaVA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the commands that only copy or read files of LLaVA's start without torch
    from torch import nn

    from .base import Host


def host_of(model: nn.Module) -> Host:
    """The host that a model belongs to.

    Raises:
        TypeError: when none knows it.
    """
    from .llava import model as llava

    hosts: list[Host] = [llava]
    for host in hosts:
        try:
            host.core(model)
            return host
        except TypeError:
            continue
    raise TypeError(f"{type(model).__name__} is no multimodal model that llava_compodistill knows (LLaVA's).")


def load_model(path: str, base: str | None = None, **options: Any) -> nn.Module:
    """A model of a checkpoint of any kind; see `hosts.llava.loader.load_model`, today's only loader."""
    from .llava.loader import load_model as load_llava

    return load_llava(path, base, **options)
