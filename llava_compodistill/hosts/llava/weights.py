"""Files of weights, read without running anything that a pickle may hide; a damaged one is named."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import CheckpointError


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read a `.bin` of tensors without running any code that a pickle may hide."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise a dozen kinds
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(folder: str, stem: str) -> dict[str, torch.Tensor]:
    """Read STEM.safetensors of a folder, or STEM.bin where there is none."""
    path = os.path.join(folder, f"{stem}.safetensors")
    if not os.path.isfile(path):
        return read_weights(os.path.join(folder, f"{stem}.bin"))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def refuse_damaged_weights(folder: str) -> None:
    """Raise CheckpointError for a folder's first file of weights that cannot be read."""
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else ()):
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            read_tensors(folder, stem)
        elif suffix == ".bin" and name.startswith(("pytorch_model", "adapter_model")):
            read_weights(os.path.join(folder, name))
