"""A teacher whose tokenizer is not the student's: it reads every sample through its own, under its own template.

What it reads goes along with the student's batch, and with it which of the answers' tokens correspond.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SampleError, TemplateError
from ..hosts.llava.default_templates import CAPTIONS_ALONE, DEFAULT_TEMPLATES
from ..hosts.llava.loader import read_config, read_tokenizer
from ..hosts.llava.reading import read_conversation
from ..hosts.llava.templates import prepare_tokenizer, under_template
from ..hosts.token_bytes import TokenBytes
from ..pair.tokens import TEACHER, align_answers, first_difference, shared_tokens
from .arguments import ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)

#: LLaVA's own tokens, which a model's config may add to a tokenizer.
MARKERS = {"<im_start>", "<im_end>", "<im_patch>"}


@dataclass(frozen=True)
class TeacherText:
    """How a teacher reads the student's samples.

    Attributes:
        tokenizer: the teacher's, padded on the right.
        template: name of its conversation template.
        use_im_start_end: whether its checkpoint has markers around images.
        token_bytes, student_bytes: of both tokenizers.
    """

    tokenizer: Any
    template: str
    use_im_start_end: bool
    token_bytes: TokenBytes
    student_bytes: TokenBytes

    def read(self, record: dict[str, Any], sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A record of the data as the teacher reads it.

        Args:
            sample: as the student reads it, input_ids and labels [N].

        Returns:
            input_ids and labels [N_T], and `aligned` [S, 2], see `align_answers`.

        Raises:
            SampleError: when template and tokenizer do not fit the conversation.
        """
        ids, labels = read_conversation(
            record["conversations"],
            "image" in record,
            self.tokenizer,
            self.token_bytes,
            self.template,
            self.use_im_start_end,
        )
        mine = sample["input_ids"], sample["labels"]
        aligned = align_answers(mine, (ids, labels), self.student_bytes, self.token_bytes)
        return {"input_ids": ids, "labels": labels, "aligned": aligned}


class TeacherTextCollator:
    """Collates what the student reads, and under TEACHER what its teacher reads.

    Args:
        student, teacher: LLaVA's collators with the tokenizer of each.
    """

    def __init__(self, student: Callable[[Sequence[Any]], dict], teacher: Callable[[Sequence[Any]], dict]):
        self.student, self.teacher = student, teacher

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        read = [sample[TEACHER] for sample in samples]
        theirs = self.teacher(read)
        aligned = [sample["aligned"] for sample in read]
        theirs["aligned"] = torch.nn.utils.rnn.pad_sequence(aligned, batch_first=True, padding_value=-1)
        return {**self.student(samples), TEACHER: theirs}


def find_teacher_text(
    tokenizer: Any, model_args: ModelArguments, args: TrainingArguments
) -> tuple[TeacherText | None, int | None]:
    """How the teacher of a run reads its samples; or None where it reads them as the student does, and the number of
    tokens that both have.

    Args:
        tokenizer: the student's, prepared.

    Raises:
        ValueError: when the teacher's template cannot be told, does not fit its tokenizer, or is named in vain.
    """
    path = model_args.teacher_model_path
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    own = not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in names)
    source = path if own else model_args.teacher_model_base
    theirs = read_tokenizer(source, model_max_length=args.model_max_length, padding_side="right")
    config = read_config(path)
    shared = shared_tokens(tokenizer, theirs)
    if shared is not None and _can_read(config, tokenizer, theirs):
        if model_args.teacher_version:
            raise ValueError(
                f"--teacher_version {model_args.teacher_version}: the teacher shares the student's tokenizer and "
                "reads the student's tokens, under --version. Leave the flag out."
            )
        return None, shared
    if getattr(config, "mm_vision_tower", None) is None:
        return None, None  # no LLaVA checkpoint, which loading it will say
    token = first_difference(tokenizer, theirs)
    template, reason = _template(config, path, model_args)
    logger.info(
        "The teacher's tokenizer (%s, %d tokens) is not the student's (%s, %d tokens): %r is %s and %s. The teacher "
        "reads each sample through its own, under the template %s (%s).",
        *(source, len(theirs), model_args.model_name_or_path, len(tokenizer)),
        *(token, theirs.get_vocab().get(token), tokenizer.get_vocab().get(token), template, reason),
    )
    try:
        with under_template(template) as used:
            prepare_tokenizer(theirs, used)
    except TemplateError as error:
        raise ValueError(f"The teacher's template ({reason}): {error} --teacher_version names another.") from error
    start_end = bool(getattr(config, "mm_use_im_start_end", False))
    text = TeacherText(theirs, template, start_end, TokenBytes(theirs), TokenBytes(tokenizer))
    _try_out(text, source)
    return text, None


def _can_read(config: Any, tokenizer: Any, theirs: Any) -> bool:
    """Whether a teacher can be given the student's tokens, of which its own tokenizer may lack the last: its embedding
    has rows for them (Qwen's is padded), and they are none of LLaVA's markers, which stand in every sample."""
    own = tokenizer.get_vocab().keys() - theirs.get_vocab().keys()
    return len(tokenizer) <= config.vocab_size and not own & MARKERS


def _template(config: Any, path: str, model_args: ModelArguments) -> tuple[str, str]:
    """The template of a teacher, and why this one."""
    if model_args.teacher_version:
        return model_args.teacher_version, "--teacher_version"
    if model_args.version == CAPTIONS_ALONE:
        return CAPTIONS_ALONE, f"as --version {CAPTIONS_ALONE}, which holds captions alone"
    named = getattr(config, "compodistill", None)
    named = named.get("template") if isinstance(named, dict) else None
    if named and named != CAPTIONS_ALONE:
        return named, "named in its config.json"
    kind = config.model_type.removesuffix("_sparse")
    if kind not in DEFAULT_TEMPLATES:
        raise ValueError(f"{path}: its config.json names no conversation template. Give --teacher_version.")
    return DEFAULT_TEMPLATES[kind], f"that of {config.model_type}; --teacher_version names another"


def _try_out(text: TeacherText, source: str) -> None:
    """Read a conversation, so that what cannot be read is said before weights are loaded."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    try:
        read_conversation(turns, True, text.tokenizer, text.token_bytes, text.template, text.use_im_start_end)
    except SampleError as error:
        raise ValueError(
            f"The template {text.template!r} does not fit the teacher's tokenizer ({source}): {error}. Name the "
            "template that the teacher was trained under with --teacher_version."
        ) from error
