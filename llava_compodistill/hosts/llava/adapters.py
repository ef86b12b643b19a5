"""A checkpoint's adapter alone, without its language model."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...errors import CheckpointError
from ..files import read_object
from .host import import_llava
from .loader import ADAPTER_FILE, LORA_EXTRA_FILE, checkpoint_kind, read_config
from .weights import read_weights, refuse_broken_weights

_PART = "mm_projector."


def read_adapter(path: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The adapter of a checkpoint in a local folder (full, LoRA or adapter), frozen.

    Raises:
        CheckpointError: when the folder has none, or its weights do not fit its config.json.
    """
    if not os.path.isdir(path):
        raise CheckpointError(
            f"--teacher_model_path {path}: the teacher's adapter is read from a folder. Download the checkpoint, or "
            "give --pretrain_mm_mlp_adapter of a student that has the adapter."
        )
    weights = _adapter_weights(path)
    adapter = import_llava("llava.model.llava_arch").build_vision_projector(read_config(path))
    try:
        adapter.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its adapter's weights do not fit its config.json ({error}).") from error
    return adapter.to(dtype).requires_grad_(False)


def _adapter_weights(path: str) -> dict[str, torch.Tensor]:
    kind = checkpoint_kind(path)
    if kind in ("adapter", "lora"):
        found = read_weights(os.path.join(path, ADAPTER_FILE if kind == "adapter" else LORA_EXTRA_FILE))
    else:
        found = _from_whole(path)
    named = {name.rpartition(_PART)[2]: value for name, value in found.items() if _PART in name}
    if not named:
        raise CheckpointError(f"{path} has no weights of an adapter ({_PART}…): it is no LLaVA checkpoint.")
    return named


def _from_whole(path: str) -> dict[str, torch.Tensor]:
    """Of a whole model's files, what belongs to the adapter."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        file = os.path.join(path, index)
        if os.path.isfile(file):
            places = read_object(file, CheckpointError).get("weight_map")
            if not isinstance(places, dict):
                raise CheckpointError(f"{file} is damaged: it has no weight_map.")
            names = sorted({str(shard) for weight, shard in places.items() if _PART in weight})
            break
    else:
        names = [
            name for name in ("model.safetensors", "pytorch_model.bin") if os.path.isfile(os.path.join(path, name))
        ]
    found: dict[str, torch.Tensor] = {}
    for name in names:
        file = os.path.join(path, name)
        if name.endswith(".bin"):
            found |= {key: value for key, value in read_weights(file).items() if _PART in key}
            continue
        try:
            with safe_open(file, framework="pt") as weights:
                part = {key: weights.get_tensor(key) for key in weights.keys() if _PART in key}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        refuse_broken_weights(part.items(), file)
        found |= part
    return found
