"""Sizes of language models, vision encoders and adapters, read from config.json or from a table of known models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import PlanError

#: Base `model_type`s that hosts/llava has classes for; a LLaVA checkpoint says "llava_" before it.
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


@dataclass(frozen=True)
class LanguageModel:
    """A decoder of the Llama kind: rotary attention with grouped keys, gated feed-forward network, RMS norms.

    Attributes:
        hidden, layers, heads, kv_heads, head_size, intermediate, vocab: D, L, H, H_kv, d, I, V.
        tied: whether the head is the embedding.
        qkv_bias, out_bias, mlp_bias: which linear layers have biases.
        qk_norm: whether queries and keys are normed (Qwen3).
    """

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's linear maps: q, k, v, o, gate, up, down."""
        d, wide = self.hidden, self.intermediate
        attention = ((d, self.query_size), (d, self.kv_size), (d, self.kv_size), (self.query_size, d))
        return (*attention, (d, wide), (d, wide), (wide, d))

    @property
    def matrices(self) -> int:
        """Weights of all layers' linear maps, without biases."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.out_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_size
        outside = self.embedding * (1 if self.tied else 2) + self.hidden
        return self.matrices + self.layers * (biases + norms) + outside


@dataclass(frozen=True)
class Tower:
    """A CLIP or SigLIP vision encoder without its pooling head. CLIP has a class token, which LLaVA drops."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    pixels: int
    patch: int

    @property
    def patches(self) -> int:
        """Visual tokens of an image, N_v."""
        return (self.pixels // self.patch) ** 2

    @property
    def positions(self) -> int:
        """What the encoder computes on: the patches and CLIP's class token."""
        return self.patches + (self.family == "clip")

    @property
    def parameters(self) -> int:
        d, wide = self.hidden, self.intermediate
        layer = 4 * (d * d + d) + 2 * d * wide + wide + d + 4 * d
        stem = 3 * self.patch**2 * d + self.positions * d
        # CLIP: class token and the norm before the layers; SigLIP: a bias of the stem. Both: the norm behind.
        extra = 3 * d if self.family == "clip" else d
        return self.layers * layer + stem + extra + 2 * d


@dataclass(frozen=True)
class Adapter:
    """LLaVA's projector from D_v to a language model's width: `linear` (depth 1) or `mlp<depth>x_gelu`."""

    inputs: int
    outputs: int
    depth: int

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs + (self.depth - 1) * (self.outputs**2 + self.outputs)


def adapter(kind: str, inputs: int, outputs: int, source: str) -> Adapter:
    """The adapter of a `mm_projector_type`.

    Raises:
        PlanError: for a type that LLaVA's projector does not have.
    """
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", str(kind))
    if kind != "linear" and not match:
        raise PlanError(f"{source}: mm_projector_type {kind!r} is not planned; linear and mlp<N>x_gelu are.")
    return Adapter(inputs, outputs, int(match.group(1)) if match else 1)


def _qwen(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool = False
) -> LanguageModel:
    sizes = hidden, layers, heads, kv_heads, hidden // heads, intermediate, vocab
    return LanguageModel(name, "qwen2", *sizes, tied=tied, qkv_bias=True)


def _llama(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool = False
) -> LanguageModel:
    sizes = hidden, layers, heads, kv_heads, hidden // heads, intermediate, vocab
    return LanguageModel(name, "llama", *sizes, tied=tied)


#: Facts of the config.json that each repository on the Hugging Face hub has under this name.
LANGUAGE_MODELS = {
    model.name: model
    for model in (
        _qwen("Qwen/Qwen1.5-0.5B", 1024, 24, 16, 16, 2816, 151_936, True),
        _qwen("Qwen/Qwen1.5-1.8B", 2048, 24, 16, 16, 5504, 151_936),
        _qwen("Qwen/Qwen1.5-4B", 2560, 40, 20, 20, 6912, 151_936),
        _qwen("Qwen/Qwen1.5-7B", 4096, 32, 32, 32, 11008, 151_936),
        _qwen("Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151_936, True),
        _qwen("Qwen/Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151_936, True),
        _qwen("Qwen/Qwen2.5-3B", 2048, 36, 16, 2, 11008, 151_936, True),
        _qwen("Qwen/Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152_064),
        _llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2048, 22, 32, 4, 5632, 32_000),
        _llama("mtgv/MobileLLaMA-1.4B-Base", 2048, 24, 16, 16, 5632, 32_000),
        _llama("mtgv/MobileLLaMA-2.7B-Base", 2560, 32, 32, 32, 6912, 32_000),
        _llama("lmsys/vicuna-7b-v1.5", 4096, 32, 32, 32, 11008, 32_000),
        _llama("meta-llama/Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128_256, True),
        _llama("meta-llama/Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128_256, True),
        _llama("meta-llama/Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128_256),
    )
}
TOWERS = {
    tower.name: tower
    for tower in (
        Tower("google/siglip-so400m-patch14-384", "siglip", 1152, 27, 16, 4304, 384, 14),
        Tower("google/siglip2-so400m-patch14-384", "siglip", 1152, 27, 16, 4304, 384, 14),
        Tower("openai/clip-vit-large-patch14-336", "clip", 1024, 24, 16, 4096, 336, 14),
    )
}
#: The scripts' default.
DEFAULT_TOWER = "google/siglip-so400m-patch14-384"
#: What transformers' classes put where config.json says nothing, as the hub's configs of base models do.
_TOWER_DEFAULTS = {
    "siglip": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
               "image_size": 224, "patch_size": 16},
    "clip": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "image_size": 224, "patch_size": 32},
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """A model as `--student` or `--teacher` names it.

    Attributes:
        model: its language model.
        tower: the encoder that its config names, if it is a LLaVA checkpoint.
        projector: its `mm_projector_type`, if it is one.
        source: the file that was read; the name for a known model.
    """

    model: LanguageModel
    tower: str | None
    projector: str | None
    source: str


def read_language_model(name: str, flag: str) -> Described:
    """The language model of a folder with config.json, of a config.json, or of a known name.

    Args:
        flag: as it is called in errors, such as --student.

    Raises:
        PlanError: for what is none of these, and naming file and field where the config lacks one or has a wrong one.
    """
    path = _config_file(name)
    if path is None:
        model = _known(name, LANGUAGE_MODELS, flag, "model")
        return Described(model, None, None, model.name)
    config = read_json(path)
    model = _language_model(config, name, str(path))
    return Described(model, config.get("mm_vision_tower"), config.get("mm_projector_type"), str(path))


def read_tower(name: str, flag: str) -> Tower:
    """The encoder of a folder with config.json (of the whole model or of its vision part) or of a known name.

    Raises:
        PlanError: as `read_language_model`.
    """
    path = _config_file(name)
    if path is None:
        return _known(name, TOWERS, flag, "encoder")
    config = read_json(path)
    kind = str(config.get("model_type", ""))
    family = kind.removesuffix("_vision_model")
    if family not in _TOWER_DEFAULTS:
        raise PlanError(f"{path}: model_type {kind!r} is no vision encoder that is planned; clip and siglip are.")
    part = config.get("vision_config", config)
    if not isinstance(part, dict):
        raise PlanError(f"{path}: the field vision_config is {part!r}, and must be an object.")
    values = {key: part.get(key, default) for key, default in _TOWER_DEFAULTS[family].items()}
    hidden, layers, heads, wide, pixels, patch = (_positive(values, key, str(path)) for key in values)
    return Tower(name, family, hidden, layers, heads, wide, pixels, patch)


def with_vocabulary(model: LanguageModel, vocab: int | None) -> LanguageModel:
    """The model with another number of rows in its embedding and head."""
    return model if vocab is None else replace(model, vocab=vocab)


def _language_model(config: Mapping[str, Any], name: str, source: str) -> LanguageModel:
    kind = config.get("model_type")
    if kind is None:
        raise PlanError(f"{source}: the field model_type is missing. It has to be one of {', '.join(FAMILIES)}.")
    family = "llama" if kind == "llava" else str(kind).removeprefix("llava_")  # LLaVA 1.0 wrote "llava"
    if family not in FAMILIES:
        raise PlanError(f"{source}: model_type {kind!r} is not planned; {', '.join(FAMILIES)} are, also as llava_….")
    hidden = _positive(config, "hidden_size", source)
    heads = _positive(config, "num_attention_heads", source)
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _positive(config, "num_key_value_heads", source)
    if heads % kv_heads:
        raise PlanError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}.")
    if config.get("head_dim") is not None:
        head_size = _positive(config, "head_dim", source)
    elif family == "qwen3":
        head_size = 128  # the class's own default
    elif hidden % heads:
        raise PlanError(f"{source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}.")
    else:
        head_size = hidden // heads
    biased = bool(config.get("attention_bias", False))
    return LanguageModel(
        name=name,
        family=family,
        hidden=hidden,
        layers=_positive(config, "num_hidden_layers", source),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=_positive(config, "intermediate_size", source),
        vocab=_positive(config, "vocab_size", source),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and biased),
        out_bias=family in ("llama", "qwen3") and biased,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _positive(config: Mapping[str, Any], field: str, source: str) -> int:
    if field not in config:
        raise PlanError(f"{source}: the field {field} is missing.")
    value = config[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{source}: the field {field} is {value!r}, and must be a whole number of 1 or more.")
    return value


def _config_file(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir():
        return path / "config.json"
    return path if path.is_file() or path.suffix == ".json" else None


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        PlanError: naming the file.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path}: must hold a JSON object of fields.")
    return config


def _known(name: str, table: Mapping[str, Any], flag: str, what: str) -> Any:
    """By the full name or its last part, whatever the case.

    Raises:
        PlanError: for a name that is not in the table.
    """
    wanted = name.lower()
    for key, value in table.items():
        if wanted in (key.lower(), key.lower().split("/")[-1]):
            return value
    raise PlanError(
        f"{flag} {name}: no such folder or file, and no {what} whose sizes are known here. Give a folder with "
        f"config.json, the config.json itself, or one of {', '.join(table)}."
    )
