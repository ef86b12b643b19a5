"""The plugin's conversation templates, and what a question looks like under any of them. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from ...errors import TemplateError
from .host import import_llava_scorer


def plugin_templates(conversation: ModuleType) -> dict[str, Any]:
    """The plugin's templates by name.

    Args:
        conversation: LLaVA's `llava.conversation`.
    """
    styles = conversation.SeparatorStyle
    # Qwen's own chat template (ChatML), as its instruction models were trained on it.
    qwen = conversation.Conversation(
        system="<|im_start|>system\nYou are a helpful assistant.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        version="qwen_1_5",
        messages=(),
        offset=0,
        sep_style=styles.MPT,
        sep="<|im_end|>\n",
    )
    # LLaVA v1's turns with a short system line and the end token of Qwen's base models, which have not learned ChatML.
    base = conversation.Conversation(
        system="Answer the questions.",
        roles=("USER", "ASSISTANT"),
        version="qwen_base",
        messages=(),
        offset=0,
        sep_style=styles.TWO,
        sep=" ",
        sep2="<|endoftext|>",
    )
    # LLaVA v1's own wording with that end token, which the authors' code trains under.
    v1 = dataclasses.replace(base, system=conversation.conv_vicuna_v1.system, version="qwen_v1")
    # Question and answer with nothing around them, the image first, for base models too small for wrapping.
    bare = conversation.Conversation(
        system="",
        roles=("", ""),
        version="qwen_qa",
        messages=(),
        offset=0,
        sep_style=styles.PLAIN,
        sep="\nAnswer:",
        sep2="<|endoftext|>",
    )
    return {"qwen_1_5": qwen, "qwen_2": qwen, "qwen_2_5": qwen, "qwen_base": base, "qwen_qa": bare, "qwen_v1": v1}


def prompt_under(template: str, marker: str = "<image>") -> str:
    """What a model is given under a template, word for word, with {question} for the question.

    Args:
        marker: what stands for the image.

    Raises:
        TemplateError: for an unknown name.
    """
    library = import_llava_scorer("llava.conversation")
    templates = {**library.conv_templates, **plugin_templates(library)}
    if template not in templates:
        raise TemplateError(f"{template!r} is no conversation template. Known: {', '.join(sorted(templates))}.")
    conversation = templates[template].copy()
    conversation.append_message(conversation.roles[0], f"{marker}\n{{question}}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
