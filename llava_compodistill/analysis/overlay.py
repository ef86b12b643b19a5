"""Where a phrase looks in an image: its tokens are found in the text, whatever the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..eval.engine import Engine
from ..eval.scoring import batches
from .samples import Sample
from .similarity import all_maps


def phrase_tokens(tokenizer: Any, ids: Sequence[int], phrase: str) -> list[int]:
    """Positions in `ids` of the tokens that spell a phrase: of its last occurrence, and no more than it takes.

    Args:
        ids: tokens of a text; negative ones stand for images.

    Raises:
        DataError: when the text does not hold the phrase.
    """
    wanted = phrase.strip()
    start, end = len(ids), len(ids)
    while wanted not in _text(tokenizer, ids[start:end]):
        if start == 0:
            raise DataError(f"the text does not hold the phrase {phrase!r}: {_text(tokenizer, ids)!r}.")
        start -= 1
    while wanted in _text(tokenizer, ids[start : end - 1]):
        end -= 1
    return list(range(start, end))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """What tokens spell, images as a character that no phrase holds."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token < 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\0".join(tokenizer.decode(part) for part in parts)


@torch.inference_mode()
def phrase_attention(engine: Engine, sample: Sample, phrase: str, layers: Sequence[int]) -> np.ndarray:
    """[side, side]: head-averaged attention of a phrase's tokens over the image, the mean over layers and tokens.

    Raises:
        DataError: when prompt and answer do not hold the phrase, or none of its tokens comes after the image.
    """
    (inputs,) = batches([sample.asked()], engine.model, engine.tokenizer, version=engine.version, batch_size=1)
    ids = inputs["input_ids"][0].tolist()
    tokens = phrase_tokens(engine.tokenizer, ids, phrase)
    maps, batch = all_maps(engine.model, inputs, layers)
    visual = int((batch.visual_index[0] >= 0).sum())
    # Behind the image every token stands as many places later as the image has tokens more than its marker.
    marker = next(place for place, token in enumerate(ids) if token < 0)
    rows = [token + visual - 1 for token in tokens if token > marker]
    if not rows:
        raise DataError(f"the phrase {phrase!r} stands before the image, and cannot look at it.")
    look = torch.stack([maps[layer][0, rows].float().mean(dim=0) for layer in layers]).mean(dim=0)
    side = engine.model.get_vision_tower().num_patches_per_side
    return look.reshape(side, side).cpu().numpy()
