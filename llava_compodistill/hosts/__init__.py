"""The code bases that a model can come from. Today: LLaVA."""

from __future__ import annotations

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
