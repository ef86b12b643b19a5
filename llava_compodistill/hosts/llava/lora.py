"""LoRA checkpoints of any release of PEFT, and of a language model whose vocabulary has grown since."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError

#: Entries that newer releases of PEFT write whatever the LoRA is like, and that say nothing about its weights.
_SAY_NOTHING = {"peft_version", "qalora_group_size", "megatron_core", "auto_mapping", "inference_mode"}


def lora_config(content: dict[str, Any], path: str) -> Any:
    """A `LoraConfig` of the installed PEFT from an adapter_config.json that another release may have written.

    Entries that the installed one lacks are left out where they are off.

    Args:
        content: of the file.
        path: of the folder, for errors.

    Raises:
        CheckpointError: when the adapter is no LoRA, or uses something that the installed PEFT lacks.
    """
    import peft

    file = os.path.join(path, "adapter_config.json")
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {content.get('peft_type')!r} is no LoRA.")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    lacking = sorted(name for name, value in content.items() if name not in known | _SAY_NOTHING and value)
    if lacking:
        raise CheckpointError(
            f"{file}: PEFT {peft.__version__} does not know {', '.join(lacking)}, which this LoRA uses: install a "
            "newer peft."
        )
    values = {name: value for name, value in content.items() if name in known and name != "peft_type"}
    return peft.LoraConfig(**values)


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
