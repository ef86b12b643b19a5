"""Qwen language models for LLaVA, beside the Llama and Mistral it has.

Qwen1.5, 2 and 2.5 share transformers' `qwen2` architecture. Loading them as LlavaLlama drops their q/k/v biases
without a word; here they keep them, and their padded vocabulary is not shrunk. Qwen3 needs transformers 4.51 or newer.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .experts import Experts, install_experts, read_experts


class MultimodalForward:
    """What makes a causal language model a LLaVA: it takes `images` and `image_sizes` as LLaVA's other models do.

    Stands before the language model among the base classes, and LLaVA's `LlavaMetaForCausalLM` behind it: FSDP2 gives
    a model another class, which Python refuses where the first base is an abstract one.
    """

    def get_model(self) -> nn.Module:
        return self.model

    @property
    def device(self) -> torch.device:
        """That of the first weights, for which LLaVA's merge asks three times a sample: transformers walks over the
        modules to find them."""
        weight = getattr(self.model.embed_tokens, "weight", None)
        return super().device if weight is None else weight.device

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        images: torch.FloatTensor | None = None,
        image_sizes: list | None = None,
        **kwargs: Any,
    ):
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        images: torch.FloatTensor | None = None,
        image_sizes: list | None = None,
        **kwargs: Any,
    ):
        if "inputs_embeds" in kwargs:
            raise ValueError("generate() takes `inputs` (token ids) and `images`, not `inputs_embeds`.")
        position_ids = kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        if images is None:
            inputs_embeds = self.get_model().embed_tokens(inputs)
        else:
            _, position_ids, attention_mask, _, inputs_embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, position_ids, attention_mask, None, None, images, image_sizes
            )
        return super().generate(
            # Without it transformers 4.37 asks for a BOS token, and puts it before the answer.
            inputs=inputs_embeds.new_empty(len(inputs_embeds), 0, dtype=torch.long),
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        visual = {name: kwargs.pop(name) for name in ("images", "image_sizes") if kwargs.get(name) is not None}
        prepared = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        prepared.update(visual)
        return prepared


class LlavaQwen2Config(Qwen2Config):
    model_type = "llava_qwen2"


class LlavaQwen2Model(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(MultimodalForward, Qwen2ForCausalLM, LlavaMetaForCausalLM):
    """LLaVA on a Qwen1.5, Qwen2 or Qwen2.5 language model."""

    config_class = LlavaQwen2Config

    def __init__(self, config: LlavaQwen2Config):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


#: The classes that LLaVA does not have.
OWN_CLASSES: tuple[type, ...] = (LlavaQwen2ForCausalLM,)
#: Base language model's `model_type` -> the LLaVA model built on it. A LLaVA checkpoint says "llava_" before it.
MODEL_CLASSES = {
    "qwen2": LlavaQwen2ForCausalLM,
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
}

if hasattr(transformers, "Qwen3Config"):

    class LlavaQwen3Config(transformers.Qwen3Config):
        model_type = "llava_qwen3"

    class LlavaQwen3Model(LlavaMetaModel, transformers.Qwen3Model):
        config_class = LlavaQwen3Config

    class LlavaQwen3ForCausalLM(MultimodalForward, transformers.Qwen3ForCausalLM, LlavaMetaForCausalLM):
        """LLaVA on a Qwen3 language model."""

        config_class = LlavaQwen3Config

        def __init__(self, config: LlavaQwen3Config):
            super(transformers.Qwen3ForCausalLM, self).__init__(config)
            self.model = LlavaQwen3Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    OWN_CLASSES += (LlavaQwen3ForCausalLM,)
    MODEL_CLASSES["qwen3"] = LlavaQwen3ForCausalLM


def _sparse(dense: type) -> type:
    """The class of a LLaVA model whose feed-forward layers are mixtures of experts."""
    kind = f"{dense.config_class.model_type}_sparse"
    name = dense.__name__.replace("For", "SparseFor")
    config = type(f"{name.removesuffix('ForCausalLM')}Config", (dense.config_class,), {"model_type": kind})

    def __init__(self, config):
        dense.__init__(self, config)
        install_experts(self)

    return type(name, (dense,), {"config_class": config, "__init__": __init__, "__doc__": _sparse.__doc__})


_SPARSE = {f"{base}_sparse": _sparse(dense) for base, dense in MODEL_CLASSES.items()}
MODEL_CLASSES |= _SPARSE
OWN_CLASSES += tuple(_SPARSE.values())


def model_class(model_type: str) -> type:
    """The LLaVA model class for the `model_type` of a base language model or of a LLaVA checkpoint.

    Raises:
        ValueError: for an architecture that neither LLaVA nor the plugin has, or this transformers has not.
    """
    base = "llama" if model_type == "llava" else model_type.removeprefix("llava_")  # LLaVA 1.0 wrote "llava"
    if base not in MODEL_CLASSES:
        known = ", ".join(sorted(MODEL_CLASSES.keys() - _SPARSE))
        hint = f"; Qwen3 needs transformers 4.51 or newer, not {transformers.__version__}" if base == "qwen3" else ""
        raise ValueError(f"model_type {model_type!r} in config.json: supported language models are {known}{hint}.")
    return MODEL_CLASSES[base]


def _sparse_class(model_type: str) -> type:
    dense = model_class(model_type)
    if dense in _SPARSE.values():
        raise ValueError(f"model_type {model_type}: this model has experts already.")
    return next(sparse for sparse in _SPARSE.values() if sparse.__base__ is dense)


def upcycle(core: nn.Module, settings: Experts) -> None:
    """Turn a dense LLaVA model into a sparse one, in place: each expert starts as a copy of the layer's network.

    Raises:
        ValueError: for a model that has experts already, or cannot have them.
    """
    cls = _sparse_class(core.config.model_type)
    if any(hasattr(parameter, "ds_id") for parameter in core.parameters()):
        raise ValueError("Weights that ZeRO-3 has partitioned cannot be copied into experts.")
    # Layers hold the same config and there are hooks on modules: both change their class and stay who they are.
    core.config.__class__ = cls.config_class
    core.config.experts = {**asdict(settings), "layers": list(settings.layers)}
    core.__class__ = cls
    layers = core.get_model().layers
    dense = {number: layers[number].mlp for number in read_experts(core.config).layers}
    install_experts(core)
    for number, network in dense.items():
        sparse = layers[number].mlp
        weight = next(network.parameters())
        sparse.to(device=weight.device, dtype=weight.dtype).train(network.training)
        for expert in sparse.experts:
            expert.load_state_dict(network.state_dict())
