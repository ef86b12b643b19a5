"""CompoDistill: distil a large LLaVA into a small one that still sees (arXiv 2510.12184).

Importing the package needs neither LLaVA nor a GPU; names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib

from .version import __version__

_LAZY = {
    "register": "plugin",
    "unregister": "plugin",
    "CompoDistillTrainer": "trainer",
    "TAFProjector": "taf",
    "build_taf_projector": "taf",
    "capture_visual_attention": "capture",
    "record_merge": "visual_tokens",
    "visual_attention_map": "ops.visual_attention",
    "visual_understanding_layers": "layer_matching",
    "match_layers": "layer_matching",
    "attention_distillation_loss": "losses",
    "logit_distillation_loss": "losses",
    "load_teacher": "models",
    "build_student": "models",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
