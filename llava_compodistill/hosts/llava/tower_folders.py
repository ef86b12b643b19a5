"""Folders of vision towers: whether one is there, and holds a tower at all. Nothing of it is loaded yet."""

from __future__ import annotations

import os
from typing import Any

from ...errors import CheckpointError
from ..files import is_path, read_object

#: `model_type` of the folders that a vision tower can be read from. (SigLIP 2's NaFlex models are refused later.)
TOWER_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")


def find_tower(config: Any, path: str, substitute: str | None) -> None:
    """A tower given as a folder may have moved since training; hub names are left to transformers."""
    name = getattr(config, "mm_vision_tower", None)
    if not isinstance(name, str | None):
        raise CheckpointError(f"{os.path.join(path, 'config.json')}: mm_vision_tower must be a text, is {name!r:.60}.")
    if name is not None and os.path.isdir(name):
        check_tower(name, f"{os.path.join(path, 'config.json')}: mm_vision_tower ")
        return
    if name is None or not is_path(name):
        return
    if substitute is None:
        raise CheckpointError(
            f"{os.path.join(path, 'config.json')}: mm_vision_tower {name} is not there. Put the encoder's folder (or "
            "hub name) of this machine into that entry."
        )
    config.mm_vision_tower = substitute


def check_tower(folder: str, place: str = "") -> None:
    """Whether a folder holds a vision tower: of another model LLaVA would make one with random weights.

    Args:
        place: what names the folder, for the message.

    Raises:
        CheckpointError: naming the folder and the model that it holds.
    """
    found = read_object(os.path.join(folder, "config.json"), CheckpointError).get("model_type")
    if found not in TOWER_TYPES:
        raise CheckpointError(
            f"{place}{folder} holds no vision tower (model_type {found!r} in its config.json): name the folder of one "
            f"({', '.join(TOWER_TYPES)})."
        )
