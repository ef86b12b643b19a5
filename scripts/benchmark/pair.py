"""A teacher and a student of given sizes with random weights, and batches for them: speed and memory need no more."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.taf import fetch_teacher_adapter, taf_config
from llava_compodistill.train.facts import TEXT, BatchFacts, kept
from llava_compodistill.train.plan.configs import Adapter, LanguageModel, Tower
from llava_compodistill.train.plan.flops import useful
from llava_compodistill.train.plan.setup import Models, Setup

IMAGE_TOKEN = -200
IGNORE_INDEX = -100


def decoder(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> LanguageModel:
    """A Qwen1.5 or Qwen2 model of these sizes, with a head of its own."""
    size = hidden // heads
    return LanguageModel("decoder", "qwen2", hidden, layers, heads, kv_heads, size, intermediate, vocab, qkv_bias=True)


def siglip(hidden: int, layers: int, heads: int, intermediate: int, pixels: int, patch: int) -> Tower:
    return Tower("tower", "siglip", hidden, layers, heads, intermediate, pixels, patch)


@dataclass(frozen=True)
class PairSpec:
    """Sizes of a pair and of what it is trained on; ``answers`` are answer tokens a sample."""

    teacher: LanguageModel
    student: LanguageModel
    tower: Tower
    answers: int
    dtype: torch.dtype
    lengths: tuple[int, ...] = field(default=(1024, 2048))

    @property
    def models(self) -> Models:
        """The pair as `llava-compodistill plan` knows it."""
        return Models(self.student, self.tower, self.teacher, Adapter(self.tower.hidden, self.teacher.hidden, 2))

    def flops(self, batch: int, length: int) -> float:
        """Useful FLOPs of a DFT step (`plan.flops.useful`); recomputation not counted."""
        setup = Setup(trains_llm=True, distils=True, aligns=True)
        return batch * useful(self.models, setup, length, self.answers)


class Pair:
    """The models, as the package's own loader would have built them: TAF student, one tower for both."""

    def __init__(self, spec: PairSpec, device: torch.device, folder: Path, checkpointing: bool):
        register()
        self.spec, self.device = spec, device
        tower = _save_tower(spec.tower, folder / "siglip", spec.dtype)
        self.teacher = self._model(spec.teacher, tower, {}).requires_grad_(False).eval()
        self.student = self._model(spec.student, tower, taf_config(self.teacher.config)).train()
        projector = self.student.get_model().mm_projector
        fetch_teacher_adapter(projector, self.teacher.get_model().mm_projector)
        projector.teacher_adapter.requires_grad_(False)
        self.student.get_vision_tower().requires_grad_(False)
        if checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.student.config.use_cache = self.teacher.config.use_cache = False

    def _model(self, size: LanguageModel, tower: Path, extra: dict[str, Any]):
        from llava_compodistill.hosts.llava.language_models import model_class

        cls = model_class("qwen2")
        config = cls.config_class(
            vocab_size=size.vocab,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        values = {
            "mm_vision_tower": str(tower),
            "mm_hidden_size": self.spec.tower.hidden,
            "mm_vision_select_layer": -2,
            "mm_projector_type": "mlp2x_gelu",
            "tokenizer_padding_side": "right",
            **extra,
        }
        for name, value in values.items():
            setattr(config, name, value)
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.spec.dtype)
        try:
            with torch.device(self.device):
                torch.manual_seed(0)
                model = cls(config)
        finally:
            torch.set_default_dtype(before)
        model.get_vision_tower().load_model()
        return model.to(self.device, self.spec.dtype)

    def batch(self, size: int, length: int) -> dict[str, torch.Tensor]:
        """One image and one turn a sample, all of the same length; what LLaVA's collator gives."""
        text = length - self.spec.tower.patches + 1
        if text < self.spec.answers + 8:
            raise SystemExit(
                f"Length {length} leaves {text - 1} text tokens beside {self.spec.tower.patches} visual ones: too few "
                f"for {self.spec.answers} answer tokens. Take a greater --length."
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, self.spec.student.vocab, (size, text), generator=generator)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -self.spec.answers :] = ids[:, -self.spec.answers :]
        ids[:, 4] = IMAGE_TOKEN
        pixels = self.spec.tower.pixels
        images = torch.rand(size, 3, pixels, pixels, generator=generator) * 2 - 1
        return {
            "input_ids": ids.to(self.device),
            "labels": labels.to(self.device),
            "attention_mask": torch.ones_like(ids, dtype=torch.bool).to(self.device),
            "images": images.to(self.device, self.spec.dtype),
        }


class Kept:
    """Around a step on a batch: where its images and answers are is known to the CPU, as the trainer's collator leaves
    it, so that no model's merge waits for the device."""

    def __init__(self, visual_tokens: int):
        self._visual_tokens = visual_tokens
        self._ids: torch.Tensor | None = None
        self._facts: BatchFacts | None = None

    def __call__(self, batch: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        if self._ids is not batch["input_ids"]:  # once a batch, however often it is run
            here = {name: batch[name].cpu() for name in TEXT}
            self._ids, self._facts = batch["input_ids"], BatchFacts.of(here, self._visual_tokens, None)
        return kept(self._facts, batch)


def _save_tower(spec: Tower, folder: Path, dtype: torch.dtype) -> Path:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        image_size=spec.pixels,
        patch_size=spec.patch,
    )
    assert math.isqrt(spec.patches) ** 2 == spec.patches
    torch.manual_seed(0)
    SiglipVisionModel(config).to(dtype).save_pretrained(folder)
    SiglipImageProcessor(size={"height": spec.pixels, "width": spec.pixels}).save_pretrained(folder)
    return folder
