"""What the command that makes a cache and a run that trains from one have in common: the pair without its weights, and
what that needs of a cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import FlagError
from ...hosts.llava.adapters import read_adapter
from ...hosts.llava.loader import read_config, read_lora_config
from ...hosts.llava.model import count_visual_tokens
from ...methods.base import Term
from ...pair.vision import same_origin
from ..rehearsal import ConfigOnly, sketch, sketch_student
from . import settings
from .entries import What
from .read import TeacherCache, wanted_of
from .teacher import CachedTeacher, refuse_uncached

logger = logging.getLogger(__name__)


def open_cache(
    model_args: Any,
    data_args: Any,
    args: Any,
    terms: Sequence[Term],
    tokenizer: Any,
    teacher_text: Any,
    shared: int | None,
    dtype: torch.dtype | None = None,
) -> tuple[CachedTeacher, TeacherCache]:
    """The cache that `--teacher_cache` names, and the teacher that stands for its model.

    Args:
        terms: as they run on the pair (`rehearse`).
        tokenizer: the student's, prepared.
        teacher_text, shared: what `find_teacher_text` has given.
        dtype: of the adapter that is fetched from the teacher's checkpoint.

    Raises:
        FlagError, CacheError: when the run cannot do with a cache, or not with this one.
    """
    flag = f"--teacher_cache {model_args.teacher_cache}"
    teacher = look(flag, model_args, terms, teacher_text)
    what = wanted_of(terms, args, len(tokenizer) if shared is None else shared)
    wanted = describe(what, model_args, data_args, args, tokenizer, teacher)
    cache = TeacherCache(model_args.teacher_cache, wanted, tokenizer.pad_token_id)
    made = [cache.settings.get(name) for name in ("teacher_dtype", "quantised")]
    logger.info(
        "Teacher: read from the cache %s (made in %s); its language model is not loaded (%s).",
        model_args.teacher_cache,
        made[0] if made[1] == "no" else f"{made[0]} with weights in {made[1]}",
        said(cache.what),
    )
    path = model_args.teacher_model_path

    def adapter() -> torch.nn.Module:
        return read_adapter(path, dtype)

    return CachedTeacher(teacher.config, teacher.get_vision_tower(), cache.what, adapter), cache


def look(flag: str, model_args: Any, terms: Sequence[Term], teacher_text: Any) -> ConfigOnly:
    """Refuse what no cache is for; returns the teacher without its weights.

    Args:
        flag: that asks for a cache, for the message.

    Raises:
        FlagError: naming the reason and the way out.
    """
    if teacher_text is not None:
        raise FlagError(
            f"{flag}: the teacher's tokenizer is not the student's, and a cache holds tokens of one vocabulary. Train "
            "with the teacher itself, or take one with the student's tokenizer, such as a larger model of its family."
        )
    refuse_uncached(terms, flag)
    path = model_args.teacher_model_path
    config = read_config(path)
    if getattr(config, "mm_vision_tower", None) is None:
        raise FlagError(f"--teacher_model_path {path} is a language model without vision: give a LLaVA checkpoint.")
    teacher = sketch(config, path, model_args)
    student = sketch_student(model_args)
    if not same_origin(student.config, teacher.config):
        raise FlagError(
            f"{flag}: the vision towers differ ({student.config.mm_vision_tower} and {teacher.config.mm_vision_tower}"
            "), and a cache is made for the pixels and visual tokens of one. Train with the teacher itself."
        )
    merges = [getattr(model.config, "mm_patch_merge_type", "flat") for model in (student, teacher)]
    if merges[0] != merges[1]:
        raise FlagError(
            f"{flag}: student and teacher put the crops of an image together in different ways (mm_patch_merge_type "
            f"{merges[0]} and {merges[1]}), and a cache is made for one. Train with the teacher itself."
        )
    return teacher


def describe(
    what: What,
    model_args: Any,
    data_args: Any,
    args: Any,
    tokenizer: Any,
    teacher: ConfigOnly,
    samples: int | None = None,
) -> dict[str, Any]:
    """What a cache of a command would be (`settings.describe`)."""
    path, base = model_args.teacher_model_path, model_args.teacher_model_base
    if base is None and os.path.isfile(os.path.join(path, "adapter_config.json")):
        base = read_lora_config(path).get("base_model_name_or_path")
    return settings.describe(
        what,
        teacher=model_args.teacher_model_path,
        base=base,
        tower=teacher.config.mm_vision_tower,
        template=model_args.version,
        tokenizer=tokenizer,
        limit=args.model_max_length,
        aspect_ratio=data_args.image_aspect_ratio,
        patches=count_visual_tokens(teacher),
        samples=samples,
    )


def said(what: What) -> str:
    """What a cache holds, in words."""
    parts = []
    if what.answers:
        count = "all" if what.top_k >= what.vocab else f"the {what.top_k} likeliest"
        parts.append(f"{count} of {what.vocab} tokens at answer rows, {what.logit_bits} bits")
    if what.groups:
        parts.append(f"{len(what.groups)} mean maps, {what.rows} rows, {what.map_bits} bits")
    return "; ".join(parts)
