"""The vocabulary of a language model under a LoRA or adapter that was trained on a larger or smaller one."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ... import compat


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
    if size < known:
        return
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    weights = list({id(weight): weight for weight in tables}.values())  # one where they are tied
    with torch.no_grad(), compat.gathered(weights, modify=True):
        for weight in weights:
            weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)
