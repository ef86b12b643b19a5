"""CompoDistill: distil a large LLaVA into a small one that still sees (arXiv 2510.12184).

Importing the package needs neither LLaVA nor a GPU; names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib

from .about import __version__

_LAZY = {
    "register": "hosts.llava",
    "unregister": "hosts.llava",
    "CompoDistillTrainer": "train.trainer",
    "TAFProjector": "hosts.llava.taf",
    "build_taf_projector": "hosts.llava.taf",
    "capture_visual_attention": "record.attention",
    "record_merge": "record.merge",
    "visual_attention_map": "ops.visual_attention",
    "visual_understanding_layers": "pair.layers",
    "match_layers": "pair.layers",
    "attention_distillation_loss": "losses.attention",
    "logit_distillation_loss": "losses.tokens",
    "load_teacher": "pair.teacher",
    "build_student": "pair.student",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
