"""SigLIP and SigLIP 2 as vision towers, beside LLaVA's CLIP.

SigLIP has no class token: every patch is a visual token (729 for so400m/14 at 384), where LLaVA's CLIP code would drop
the first. Its image processor lacks the `crop_size` that LLaVA's data set reads. SigLIP 2 of fixed resolution
(google/siglip2-so400m-patch14-384) has SigLIP's architecture; its NaFlex models, of any resolution, have another.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from ...errors import CheckpointError
from .loader import read_config
from .tower_folders import check_tower


class SiglipVisionTower(nn.Module):
    """Drop-in for LLaVA's CLIPVisionTower.

    Args:
        vision_tower: name or folder of a SigLIP (or SigLIP vision) model.
        args: holds `mm_vision_select_layer` and, optionally, `mm_vision_select_feature` (patch or cls_patch: the same
            here, there is no class token).
        delay_load: read the config only; `load_model()` brings the weights.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature {self.select_feature!r}: must be patch or cls_patch.")
        if delay_load:
            self.cfg_only = SiglipVisionConfig.from_pretrained(vision_tower)
        else:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        if self.is_loaded:
            return
        self._take(SiglipVisionModel.from_pretrained(self.vision_tower_name, device_map=device_map))

    def _take(self, model: nn.Module) -> None:
        self.image_processor = SiglipImageProcessor.from_pretrained(self.vision_tower_name)
        size = self.image_processor.size
        self.image_processor.crop_size = {"height": size["height"], "width": size["width"]}
        self.vision_tower = model
        for module in list(self.vision_tower.modules()):
            if isinstance(getattr(module, "head", None), nn.Module):
                # Pools the patches into one vector, which nobody reads; and its nn.MultiheadAttention uses weights
                # that ZeRO-3 does not gather.
                module.head = nn.Identity()
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    @torch.no_grad()
    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """[B, 3, H, W] -> [B, patches, D_v], in the images' dtype; a list is encoded image by image."""
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0)) for image in images]
        outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return outputs.hidden_states[self.select_layer].to(images.dtype)

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> SiglipVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def tower_name(config: Any) -> str | None:
    """The tower that a model config (`mm_vision_tower`) or LLaVA's model arguments (`vision_tower`) name."""
    return getattr(config, "mm_vision_tower", getattr(config, "vision_tower", None))


def is_siglip(name: str) -> bool:
    """Whether a tower is SigLIP: by the config of a local folder, else by its name on the hub.

    Raises:
        CheckpointError: for a folder of another model, and for a NaFlex model, whose number of visual tokens depends
            on the image.
    """
    naflex = "naflex" in name.lower()
    if os.path.isdir(name):
        model_type = read_config(name).model_type
        check_tower(name, "the vision tower ")
        naflex = model_type in ("siglip2", "siglip2_vision_model")
        if model_type in ("siglip", "siglip_vision_model"):
            return True
    if naflex:
        raise CheckpointError(
            f"--vision_tower {name} is a SigLIP 2 NaFlex model, whose number of visual tokens depends on the image: "
            "use one of fixed resolution, such as google/siglip2-so400m-patch14-384."
        )
    return not os.path.isdir(name) and "siglip" in name.lower()
