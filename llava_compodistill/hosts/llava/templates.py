"""Conversation templates for Qwen, tokenizer set-up, and label masks that do not guess.

LLaVA's `preprocess_v1` and `preprocess_mpt` measure the lengths of pieces and hope they add up; with a tokenizer
without BOS they do not, every label becomes IGNORE_INDEX and the loss is a silent zero. Here a conversation is
tokenized piece by piece, so the mask is exact by construction, whatever the tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from llava import conversation as conversation_lib
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from transformers import PreTrainedTokenizerBase

from ...errors import SampleError, TemplateError
from .conversations import plugin_templates

#: The plugin's own templates by name.
TEMPLATES = plugin_templates(conversation_lib)
QWEN = TEMPLATES["qwen_1_5"]

#: Tokens from which a padding token may be taken, where the tokenizer has them as special tokens: a text has those
#: only where it spells out their names, while an ordinary entry of the vocabulary, as `<unk>` is in Qwen's, may occur.
_SPARE_TOKENS = ("<|endoftext|>", "<pad>", "[PAD]", "<|fim_pad|>", "<unk>", "<|im_end|>")


def preprocess_qwen(sources: Sequence[Sequence[dict]], tokenizer: Any, has_image: bool = False) -> dict[str, list]:
    """Tokenize conversations under one of `TEMPLATES`; only answers and their end tokens get labels.

    Args:
        sources: conversations, each a list of {"from": "human" | "gpt", "value": text}.
        has_image: whether `<image>` in a text stands for an image.

    Returns:
        input_ids and labels, a list of [N] tensors each.
    """
    batch: dict[str, list] = {"input_ids": [], "labels": []}
    for pieces in tokenized_pieces([(source, has_image) for source in sources], tokenizer):
        ids, labels = [], []
        for tokens, is_answer in pieces:
            ids += tokens
            labels += tokens if is_answer else [IGNORE_INDEX] * len(tokens)
        batch["input_ids"].append(torch.tensor(ids, dtype=torch.long))
        batch["labels"].append(torch.tensor(labels, dtype=torch.long))
    return batch


def tokenized_pieces(
    conversations: Sequence[tuple[Sequence[dict], bool]], tokenizer: Any, together: bool = False
) -> list[list[tuple[list[int], bool]]]:
    """Conversations under one of `TEMPLATES` as (tokens, are they learned) pieces, each piece tokenized by itself.

    Args:
        conversations: the turns, and whether `<image>` in them stands for an image.
        together: give a fast tokenizer all texts at once, which takes half the time where there are many.
    """
    template = conversation_lib.default_conversation
    first = _beginning(tokenizer)
    layout: list[list[tuple[list[str], bool]]] = []
    for source, has_image in conversations:
        layout.append([])
        for text, is_answer in _pieces(source, template):
            chunks = text.split(DEFAULT_IMAGE_TOKEN) if has_image and not is_answer else [text]
            layout[-1].append((chunks, is_answer))
    texts = [chunk for pieces in layout for chunks, _ in pieces for chunk in chunks]
    if together and texts:
        read = iter(tokenizer(texts, add_special_tokens=False).input_ids)
    else:
        read = (_tokens(tokenizer, text) for text in texts)
    found = []
    for pieces in layout:
        found.append([(list(first), False)])
        for chunks, is_answer in pieces:
            tokens = list(next(read))
            for _ in chunks[1:]:
                tokens += [IMAGE_TOKEN_INDEX, *next(read)]
            found[-1].append((tokens, is_answer))
    return found


#: Characters up to which a text's tokens are remembered: parts of templates, short questions and answers.
_SHORT = 256


def _tokens(tokenizer: Any, text: str) -> Sequence[int]:
    if len(text) <= _SHORT and getattr(tokenizer, "is_fast", False):
        return _remembered(tokenizer, len(tokenizer), text)
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=8192)
def _remembered(tokenizer: Any, size: int, text: str) -> tuple[int, ...]:
    """The tokens of a text; `size` is the vocabulary's, which tokens may have been added to."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _beginning(tokenizer: Any) -> list[int]:
    """The BOS token where the tokenizer puts one before a text, as LLaVA's evaluation will; Qwen's have none."""
    if tokenizer.bos_token_id is None:
        return []
    first = list(tokenizer("").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []


def _pieces(source: Sequence[dict], template: Any) -> list[tuple[str, bool]]:
    """A conversation as (text, is it learned) pieces in turn, which joined are the template's own prompt.

    Each prompt is one piece, tokenized as it will be when the model has to answer it.
    """
    roles = {"human": template.roles[0], "gpt": template.roles[1]}
    style, styles = template.sep_style, conversation_lib.SeparatorStyle
    turns = list(source)
    if turns and turns[0]["from"] == "gpt":  # a conversation starts with the user, as in LLaVA
        turns = turns[1:]
    pieces = [(template.system + template.sep if style != styles.PLAIN else template.system, False)]
    for turn in turns:
        if turn["from"] not in roles:
            raise SampleError(f"a turn is from {turn['from']!r}: must be human or gpt.")
        is_answer = turn["from"] == "gpt"
        role, value = roles[turn["from"]], turn["value"]
        if style == styles.PLAIN:
            pieces.append((value + (template.sep2 if is_answer else template.sep), is_answer))
        elif style == styles.MPT:
            # The end token is learned with the answer; generation stops there, so the newline after it is not.
            stop = template.sep.rstrip("\n")
            pieces += [(role, False), (value + stop, is_answer), (template.sep[len(stop) :], False)]
        elif is_answer:
            pieces += [(f"{role}:", False), (f" {value}{template.sep2}", True)]
        else:
            pieces.append((f"{role}: {value}{template.sep}", False))
    merged: list[tuple[str, bool]] = []
    for text, is_answer in pieces:
        if not text:
            continue
        if merged and not is_answer and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + text, False)
        else:
            merged.append((text, is_answer))
    return merged


def checked_preprocess(original: Callable[..., dict]) -> Callable[..., dict]:
    """LLaVA's `preprocess`, with the plugin's templates and an error where every label comes out masked."""

    def preprocess(sources, tokenizer, has_image: bool = False) -> dict:
        template = conversation_lib.default_conversation
        if template.version in TEMPLATES:
            batch = preprocess_qwen(sources, tokenizer, has_image)
        else:
            try:
                batch = original(sources, tokenizer, has_image=has_image)
            except AttributeError as error:  # `preprocess_v1` asks Llama's tokenizer things that others do not know
                raise SampleError(_misfit("the template asks for another tokenizer", template, tokenizer)) from error
        for labels in batch["labels"]:
            if not bool((labels != IGNORE_INDEX).any()):
                raise SampleError(_misfit("no label is left to learn from", template, tokenizer))
        return batch

    return preprocess


def _misfit(what: str, template: Any, tokenizer: Any) -> str:
    return (
        f"{what} under the template {template.version!r} ({template.sep_style.name}) with {type(tokenizer).__name__}: "
        "the sample has no answer, or the template does not fit the tokenizer (Qwen needs --version qwen_1_5, Llama "
        "and Vicuna v1)."
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Any) -> None:
    """Set the end-of-sequence and padding tokens that training and LLaVA's evaluation rely on.

    The end token becomes the template's own (LLaVA's evaluation has no other stop criterion). The padding token must
    be another one: the collator's mask is `input_ids != pad`, which would hide every end of an answer.

    Raises:
        ValueError: when the tokenizer has no token to pad with.
    """
    stop = (template.sep2 or template.sep).strip()
    if stop and tokenizer.convert_tokens_to_ids(stop) not in (None, tokenizer.unk_token_id):
        tokenizer.eos_token = stop
    candidates = [tokenizer.pad_token, tokenizer.unk_token, *_SPARE_TOKENS]
    for token in candidates:
        if token is None or token == tokenizer.eos_token:
            continue
        if not _is_special(tokenizer, token):
            continue
        tokenizer.pad_token = token
        return
    raise ValueError(
        f"{type(tokenizer).__name__} of {tokenizer.name_or_path} has no special token to pad with that differs from "
        f"its end token {tokenizer.eos_token!r}: set pad_token in its tokenizer_config.json."
    )


def end_token(tokenizer: PreTrainedTokenizerBase, template: Any = None) -> int | None:
    """The token that ends an answer under a template, by default LLaVA's current one; None where it has none.

    Args:
        tokenizer: prepared for it.
    """
    template = conversation_lib.default_conversation if template is None else template
    stop = (template.sep2 or template.sep).strip()
    return tokenizer.eos_token_id if stop and stop == tokenizer.eos_token else None


def _is_special(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or (index == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return False
    added = tokenizer.added_tokens_decoder.get(index)
    return token in tokenizer.all_special_tokens if added is None else added.special


def use_template(version: str) -> Any:
    """Make a template LLaVA's default, as its `--version` flag does, and return it.

    Raises:
        TemplateError: for an unknown name (LLaVA itself would fall back to Vicuna's in silence).
    """
    if version not in conversation_lib.conv_templates:
        known = ", ".join(sorted(conversation_lib.conv_templates))
        raise TemplateError(f"{version!r} is no conversation template (--version, --conv-mode). Known: {known}.")
    conversation_lib.default_conversation = conversation_lib.conv_templates[version]
    return conversation_lib.default_conversation


@contextlib.contextmanager
def under_template(version: str) -> Iterator[Any]:
    """Inside the context LLaVA's default template is another one, as for `use_template`."""
    before = conversation_lib.default_conversation
    try:
        yield use_template(version)
    finally:
        conversation_lib.default_conversation = before


def current_template() -> str:
    """The name under which LLaVA's default template, with which data are tokenized now, can be asked for again."""
    current = conversation_lib.default_conversation
    names = [name for name, template in conversation_lib.conv_templates.items() if template is current]
    # Templates with two names have the better one as their version; but the version of some is another's name.
    return current.version if current.version in names or not names else names[0]
