"""A checkpoint as an engine, through the plugin's loader."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from ..hosts.llava import import_llava, register
from .engine import Engine

E = TypeVar("E", bound=Engine)


def load_engine(
    model_path: str,
    template: str,
    *,
    model_base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kind: type[E] = Engine,
    **options: Any,
) -> E:
    """Load a LLaVA checkpoint of any kind that LLaVA's builder and the plugin know.

    Args:
        template: conversation template.
        model_base: base model of a LoRA checkpoint.
        device: cuda, cuda:N or cpu; by default cuda where there is one.
        dtype: float32, bfloat16 or float16; by default bfloat16 on cuda and float32 elsewhere.
        kind: of engine.
        options: of the engine.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = "cuda:0" if device == "cuda" else device  # LLaVA spreads a model on "cuda" over all cards
    torch_dtype = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    register(train=True)
    name = import_llava("llava.mm_utils").get_model_name_from_path(model_path)
    loader = import_llava("llava.model.builder").load_pretrained_model
    tokenizer, model, _, _ = loader(model_path, model_base, name, device=device, torch_dtype=torch_dtype)
    return kind(model.eval(), tokenizer, version=template, **options)
