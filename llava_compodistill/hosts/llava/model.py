"""Where things are in a LLaVA model: this host's answers to `hosts.base.Host`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..base import IGNORE_INDEX, MergedBatch, on_cpu, sent
from .experts import routers as routers

MERGE = "prepare_inputs_labels_for_multimodal"
ENCODE = "encode_images"
#: The token id that stands for an image until the merge (`llava.constants.IMAGE_TOKEN_INDEX`).
IMAGE_TOKEN_INDEX = -200
#: The label that real ignored positions carry through LLaVA's merge.
_MARKED = -101


def llava_core(model: nn.Module) -> nn.Module:
    """The LLaVA causal language model inside any wrapper (DDP, DeepSpeed, PEFT)."""
    for module in model.modules():
        # Asked of the class: wrappers such as PeftModel pass attributes of what they wrap off as their own.
        if hasattr(type(module), MERGE):
            return module
    raise TypeError(f"{type(model).__name__} holds no LLaVA model.")


core = llava_core


def projector(model: nn.Module) -> nn.Module:
    """The adapter from visual features to visual tokens."""
    return llava_core(model).get_model().mm_projector


def project(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """[B, N_v, D_v] -> [B, N_v, D], minding that encoder and adapter may differ in precision."""
    weight = next(projector(model).parameters(), None)
    return projector(model)(features if weight is None else features.to(weight.dtype))


def backbone(core: nn.Module) -> nn.Module:
    """The decoder without its head."""
    return core.get_model()


def decoder_layers(core: nn.Module) -> list[nn.Module]:
    """The decoder's layers, first layer first."""
    return list(core.get_model().layers)


def head(core: nn.Module) -> nn.Module:
    """The language model's head."""
    return core.get_output_embeddings()


def count_visual_tokens(model: nn.Module) -> int:
    """Visual tokens of one image: the encoder's patches (the adapters here keep their number)."""
    return model.get_vision_tower().num_patches


def has_own_tower(config: Any) -> bool:
    """Whether a model of this config keeps its encoder's weights in its own checkpoint (`trained_towers`)."""
    return bool(getattr(config, "unfreeze_mm_vision_tower", False))


def recording_merge(
    core: nn.Module, merge: Callable[..., Any], received: Callable[[MergedBatch], None], embed_once: bool = False
) -> Callable[..., Any]:
    """LLaVA's merge, which tells nobody where image tokens went, made to tell.

    It gives every visual token the label IGNORE_INDEX, as it gives every padded position; so when all other ignored
    labels carry a mark of their own, the unpadded positions that are left with IGNORE_INDEX are exactly the visual
    tokens: for any template, several images anywhere, truncation, any-resolution tiles and either padding side.

    It is given its tensors of text in the CPU's memory, where they are kept (`hosts.base.on_cpu`), and the model's
    embedding has to take its token ids from there.

    With `embed_once`, and always under ZeRO-3, the embedding is called once a batch and not once a sample.

    The forward then receives no labels, so it computes no full-vocabulary loss; and no attention mask where padding is
    on the right, since a causal model's real rows never see it, so that the fused attention kernels run.
    """

    def recording(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None):
        # LLaVA's code asks its tensors of text about ten things a sample; the CPU answers without waiting.
        device, ids = input_ids.device, on_cpu(input_ids)
        given_labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else on_cpu(labels)
        given_mask = torch.ones_like(ids) if attention_mask is None else on_cpu(attention_mask)
        marked = given_labels.masked_fill(given_labels == IGNORE_INDEX, _MARKED)
        decoder = core.get_model()
        once = embed_once or hasattr(getattr(decoder.embed_tokens, "weight", None), "ds_id")  # as ZeRO-3 marks them
        with _embedded_once(decoder, ids, given_mask) if once else contextlib.nullcontext():
            _, position_ids, mask, past_key_values, embeds, marked = merge(
                ids, position_ids, given_mask, past_key_values, marked, images, image_sizes
            )
        real = mask.bool()
        right_padded = getattr(core.config, "tokenizer_padding_side", "right") == "right"
        labels = marked.masked_fill((marked == _MARKED) | ~real, IGNORE_INDEX)
        received(MergedBatch.of(labels, real, real & (marked == IGNORE_INDEX), not right_padded, device))
        if embeds is None:  # without images the padding is as the caller made it
            return input_ids, position_ids, attention_mask, past_key_values, None, None
        position_ids = None if position_ids is None else sent(position_ids, device)
        mask = None if attention_mask is None or right_padded else sent(mask, device)
        return None, position_ids, mask, past_key_values, embeds, None

    return recording


@contextlib.contextmanager
def _embedded_once(decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
    """Inside the context LLaVA's merge, which embeds sample by sample, is served from one call for all of them.

    Under ZeRO-3 and FSDP2 a call of the embedding gathers its weights, which may be the largest of all. All ranks have
    to take part, and with packs they have different numbers of samples. Also, one dense gradient replaces one for each
    sample.
    """
    embedding = decoder.embed_tokens
    text = [sample[kept & (sample != IMAGE_TOKEN_INDEX)] for sample, kept in zip(ids, mask.bool(), strict=True)]
    waiting: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def serve(asked: torch.Tensor) -> torch.Tensor:
        nonlocal waiting
        if waiting is None:
            # Split, not sliced: the backward of a slice would make a tensor of the whole for each.
            waiting = zip(text, embedding(torch.cat(text)).split([len(sample) for sample in text]), strict=True)
        tokens, states = next(waiting, (asked[:0], asked))
        if not torch.equal(tokens, asked):
            raise RuntimeError("LLaVA's merge asked for the embeddings of other tokens than the next sample's.")
        return states

    # Beside the module, which Python then does not ask for its own.
    vars(decoder)["embed_tokens"] = serve
    try:
        yield
    finally:
        del vars(decoder)["embed_tokens"]


def text_alone(inputs: Mapping[str, Any], samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """Some samples of a batch without their images: their text closes up, and padding follows it.

    Args:
        inputs: what LLaVA's collator gives, before the merge.
        samples: [S] rows of it.

    Returns:
        input_ids, labels and attention_mask, [S, longest text].
    """
    ids, labels = inputs["input_ids"][samples], inputs["labels"][samples]
    text = ids != IMAGE_TOKEN_INDEX
    if inputs.get("attention_mask") is not None:
        text &= inputs["attention_mask"][samples].bool()
    counts = text.sum(dim=1)
    # A sample without any text keeps one token, which predicts nothing: attention needs a key.
    longest = max(1, int(counts.max()))
    order = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    places = torch.arange(longest, device=ids.device)
    there = places < counts[:, None]
    return {
        "input_ids": ids.gather(1, order).masked_fill(~there, 0),
        "labels": labels.gather(1, order).masked_fill(~there, IGNORE_INDEX),
        "attention_mask": there | (places == 0),
    }


def holds_weights(module: nn.Module | None) -> bool:
    """Whether a module is one that holds weights itself, a linear layer or a norm."""
    return module is not None and bool(module._parameters) and not list(module.children())
