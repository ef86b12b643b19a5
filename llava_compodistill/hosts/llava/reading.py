"""A conversation as another model than the student reads it: its tokenizer, its template.

The labels of LLaVA's `preprocess_v1` and `preprocess_llama_2` come from the lengths of pieces, and they give up on a
conversation where those do not add up (an empty answer is enough). No loss is taken at this model's labels, they say
where its answers are: here they are found by the end token and the answer's own bytes, whatever the tokenizer does
around them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from llava import conversation as conversation_lib
from llava.constants import IGNORE_INDEX
from llava.mm_utils import tokenizer_image_token

from ...errors import SampleError
from ..token_bytes import TokenBytes
from .host import import_llava_train
from .templates import TEMPLATES, under_template


def read_conversation(
    turns: Sequence[dict[str, str]],
    has_image: bool,
    tokenizer: Any,
    token_bytes: TokenBytes,
    version: str,
    use_im_start_end: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize a conversation of LLaVA's data as a checkpoint was trained to read it.

    Args:
        turns: {"from": "human" | "gpt", "value": text} each.
        has_image: whether `<image>` in a text stands for an image.
        version: conversation template.
        use_im_start_end: whether the checkpoint has markers around images.

    Returns:
        input_ids and labels, [N] int64; labels are the answers and their end tokens. (White space before an answer,
        which no two tokenizers treat alike, may be labelled or not.)

    Raises:
        SampleError: when the answers cannot be found, which template and tokenizer do not go together for.
    """
    train = import_llava_train()
    sources = [copy.deepcopy(list(turns))]
    with under_template(version) as template:
        if has_image:
            markers = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=use_im_start_end)
            sources = train.preprocess_multimodal(sources, markers)
        plain = template.sep_style == conversation_lib.SeparatorStyle.PLAIN
        if plain or template.version in TEMPLATES:  # their labels are exact
            batch = train.preprocess(sources, tokenizer, has_image=has_image)
            return tuple(torch.as_tensor(batch[name][0]) for name in ("input_ids", "labels"))
        return _by_end_tokens(sources[0], template, tokenizer, token_bytes, has_image)


def _by_end_tokens(
    turns: list[dict[str, str]], template: Any, tokenizer: Any, token_bytes: TokenBytes, has_image: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = template.copy()
    roles = {"human": prompt.roles[0], "gpt": prompt.roles[1]}
    turns = turns[1:] if turns and turns[0]["from"] == "gpt" else turns  # as LLaVA does
    # LLaVA's prompts leave out an empty answer, end token and all.
    prompt.messages = [[roles[turn["from"]], turn["value"] or " "] for turn in turns]
    text = prompt.get_prompt()
    ids = tokenizer_image_token(text, tokenizer) if has_image else tokenizer(text).input_ids
    stop = tokenizer.convert_tokens_to_ids((template.sep2 or template.sep).strip())
    ends = [place for place, index in enumerate(ids) if index == stop]
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    if len(ends) != len(answers) or not answers:
        raise SampleError(
            f"the template {template.version!r} ({template.sep_style.name}) with {type(tokenizer).__name__} ends "
            f"{len(ends)} of {len(answers)} answers with a token of its own: another template fits the tokenizer "
            "(--version, --teacher_version)"
        )
    pieces = token_bytes(ids)
    labels = torch.full((len(ids),), IGNORE_INDEX, dtype=torch.long)
    for end, answer in zip(ends, answers, strict=True):
        first, missing = end, _without_spaces(answer.encode())
        while missing > 0 and first > 0:
            first -= 1
            missing -= _without_spaces(pieces[first])
        labels[first : end + 1] = torch.tensor(ids[first : end + 1])
    return torch.tensor(ids, dtype=torch.long), labels


def _without_spaces(text: bytes) -> int:
    """Length without white space, which tokenizers add and take away."""
    return len(b"".join(text.split()))
