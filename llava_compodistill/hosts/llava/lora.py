"""LoRA checkpoints of any release of PEFT, and of a language model whose vocabulary has grown since."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def resize_vocabulary(model: nn.Module, size: int) -> None:
    """Give a language model the vocabulary that it had when the weights on top of it were trained.

    Rows that it lacks are the mean of those it has: nothing was learned about them, and the likeliest token stays the
    likeliest.
    """
    known = model.get_input_embeddings().num_embeddings
    if size == known:
        return
    options = {}
    if "mean_resizing" in inspect.signature(model.resize_token_embeddings).parameters:
        options["mean_resizing"] = False  # draws random rows around the mean
    model.resize_token_embeddings(size, **options)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[known:] = module.weight[:known].float().mean(dim=0).to(module.weight.dtype)
