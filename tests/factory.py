"""Random LLaVA models and batches, where a test needs no training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import IGNORE, IMAGE

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.taf import fetch_teacher_adapter, taf_config

PIXELS, PATCHES = 56, 16
WIDTH = 64  # D_v
SHARP = 6.0  # makes random attention far from uniform


def save_tower(path: Path, family: str = "siglip", patches: int = PATCHES, pixels: int = PIXELS) -> Path:
    """A random SigLIP or CLIP vision tower in a folder, with its image processor."""
    import transformers

    prefix = {"siglip": "Siglip", "clip": "CLIP"}[family]
    config = getattr(transformers, f"{prefix}VisionConfig")(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=pixels // math.isqrt(patches),
    )
    torch.manual_seed(0)
    getattr(transformers, f"{prefix}VisionModel")(config).save_pretrained(path)
    size = {"height": pixels, "width": pixels}
    values = {"size": size} if family == "siglip" else {"size": {"shortest_edge": pixels}, "crop_size": size}
    getattr(transformers, f"{prefix}ImageProcessor")(**values).save_pretrained(path)
    return path


def make_model(
    tower,
    family: str = "qwen2",
    *,
    hidden: int = 32,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 96,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    teacher=None,
    **config_values,
):
    """A random LLaVA model; with `teacher` its adapter is TAF with the teacher's P_T."""
    register()
    from llava_compodistill.hosts.llava.language_models import model_class

    cls = model_class(family)
    config = cls.config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **({"head_dim": hidden // heads} if family == "qwen3" else {}),  # fixed at 128 otherwise
    )
    values = {
        "mm_vision_tower": str(tower),
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "tokenizer_padding_side": "right",
        **({} if teacher is None else taf_config(teacher.config)),
        **config_values,
    }
    for name, value in values.items():
        setattr(config, name, value)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(SHARP)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "mm_projector" in name:
                parameter.normal_(std=0.2)
    model.get_vision_tower().load_model()
    model = model.to(dtype).eval()
    if teacher is not None:
        fetch_teacher_adapter(model.get_model().mm_projector, teacher.get_model().mm_projector)
    model.get_vision_tower().requires_grad_(False)
    assert model.config._attn_implementation == attention
    return model


def checkpoint_folder(path: Path, model, tokenizer: Path) -> Path:
    """A LLaVA checkpoint folder of a model, as any LLaVA training would have saved it."""
    weights = {name: value.clone() for name, value in model.state_dict().items() if "vision_tower" not in name}
    model.save_pretrained(path, state_dict=weights)
    for file in tokenizer.iterdir():
        shutil.copy(file, path)
    return path


def make_llama_tokenizer(folder, legacy: bool = True, text: str | None = None, vocab_size: int = 320):
    """A tokenizer of Llama's kind in a folder: SentencePiece with byte fallback, trained on a text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    text = text or "a red square above a blue circle\nUSER: What color? ASSISTANT: Red\n" * 20
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_batch(layouts: list[str], vocab: int = 90, seed: int = 0, dtype=torch.float64, padding: str = "right"):
    """A collated batch from layouts: I an image, q a prompt token, a an answer token.

    Returns an object with `inputs` (what LLaVA's collator gives) and `samples` ([ids], [labels], first image).
    """
    generator = torch.Generator().manual_seed(seed)
    samples, images = [], 0
    for layout in layouts:
        tokens = torch.randint(2, vocab, (len(layout),), generator=generator).tolist()
        ids = [IMAGE if kind == "I" else token for kind, token in zip(layout, tokens, strict=True)]
        labels = [token if kind == "a" else IGNORE for kind, token in zip(layout, tokens, strict=True)]
        samples.append((ids, labels, images))
        images += max(1, layout.count("I"))  # LLaVA gives a sample without an image an empty one
    width = max(len(ids) for ids, _, _ in samples)
    input_ids = torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (ids, targets, _) in enumerate(samples):
        place = slice(0, len(ids)) if padding == "right" else slice(width - len(ids), width)
        input_ids[row, place] = torch.tensor(ids)
        labels[row, place] = torch.tensor(targets)
    pixels = torch.rand(images, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    inputs = {"input_ids": input_ids, "labels": labels, "attention_mask": input_ids != 0, "images": pixels}
    return SimpleNamespace(inputs=inputs, samples=samples, padding=padding)


def encoder_features(model, images: torch.Tensor) -> torch.Tensor:
    """The encoder's second-to-last hidden states, straight from transformers' module."""
    tower = model.get_vision_tower().vision_tower
    with torch.no_grad():
        return tower(images, output_hidden_states=True).hidden_states[-2]
