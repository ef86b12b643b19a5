"""Vision towers with weights of their own: trained with the student (`--unfreeze_mm_vision_tower`), or before.

A LLaVA checkpoint whose config says `unfreeze_mm_vision_tower` holds the encoder's weights, under the names
`model.vision_tower.vision_tower.vision_model. ...`; from the encoder's folder (`mm_vision_tower`) only the config and
the image processor are read. LLaVA-1.6's checkpoints are of this kind.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from ... import compat
from .vision_towers import SiglipVisionTower, is_siglip


class OwnTower:
    """What makes a vision tower one with weights of its own. Stands before the tower among the base classes.

    Args:
        delay_load: the weights are to come from a LLaVA checkpoint: build the architecture alone.
        Other arguments as for LLaVA's towers.
    """

    CONFIG: type
    MODEL: type

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        self.from_checkpoint = delay_load
        super().__init__(vision_tower, args, delay_load=False)

    def load_model(self, device_map: Any = None) -> None:
        if self.is_loaded:
            return
        if self.from_checkpoint:
            self._take(self.MODEL(self.CONFIG.from_pretrained(self.vision_tower_name)))
        else:
            super().load_model(device_map)
        self.vision_tower = compat.with_vision_level(self.vision_tower)

    def forward(self, images: Any) -> Any:
        """As the frozen tower's, which runs without gradients whatever is trained; with them where a weight is."""
        encode = super().forward.__func__.__wrapped__
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            return encode(self, images)

    def unused_modules(self) -> list[nn.Module]:
        """What comes behind the hidden states of `mm_vision_select_layer`: it would never get a gradient."""
        model = self.vision_tower.vision_model
        layers = model.encoder.layers
        used = self.select_layer if self.select_layer >= 0 else len(layers) + 1 + self.select_layer
        return [*layers[used:], model.post_layernorm]


class OwnClipTower(OwnTower, CLIPVisionTower):
    """LLaVA's CLIP tower with weights of its own."""

    CONFIG, MODEL = CLIPVisionConfig, CLIPVisionModel

    def _take(self, model: nn.Module) -> None:
        self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)
        self.vision_tower = model.requires_grad_(False)
        self.is_loaded = True


class OwnSiglipTower(OwnTower, SiglipVisionTower):
    """The SigLIP tower with weights of its own."""

    CONFIG, MODEL = SiglipVisionConfig, SiglipVisionModel


def build_own_tower(name: str, config: Any, **options: Any) -> nn.Module:
    """A tower with weights of its own.

    Args:
        name: of the encoder, or its folder.
        config: the model's config or arguments.
        options: `delay_load` as LLaVA gives it.
    """
    return (OwnSiglipTower if is_siglip(name) else OwnClipTower)(name, config, **options)


def train_tower(tower: nn.Module) -> None:
    """Unfreeze a tower, up to the hidden states that become visual tokens."""
    tower.requires_grad_(True)
    for module in tower.unused_modules():
        module.requires_grad_(False)
