"""Does a method fit a pair? Asked of the configs, before weights are read: large models take minutes to load."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch

from ..hosts.llava.host import import_llava
from ..hosts.llava.loader import find_tower, read_config
from ..hosts.llava.model import count_visual_tokens
from ..hosts.llava.taf import PROJECTOR_TYPE
from ..methods.base import Term, prepared
from ..pair import Pair
from ..pair.layers import parse_band, visual_understanding_layers
from ..pair.vision import check_taf
from .arguments import ModelArguments, TrainingArguments
from .calibration import refuse_zero3
from .teacher_text import TeacherText


class ConfigOnly:
    """What a term asks of a model before training, without the model: its config and its tower's sizes."""

    def __init__(self, config: Any, tower: Any):
        self.config, self._tower = config, tower

    def get_vision_tower(self) -> Any:
        return self._tower


def rehearse(
    model_args: ModelArguments, args: TrainingArguments, teacher_text: TeacherText | None = None
) -> list[Term]:
    """Let the terms of a stage look at the pair.

    Args:
        teacher_text: of a teacher with another tokenizer.

    Returns:
        The terms as they will run on the pair.

    Raises:
        ValueError: as the terms do: which of them cannot run on this pair, and what can be done.
    """
    if not args.distilled:
        return []
    config = read_config(model_args.teacher_model_path)
    args.chosen_method.check_student(read_config(model_args.model_name_or_path), args.stage)
    if getattr(config, "mm_vision_tower", None) is None:
        return []  # no LLaVA checkpoint, which loading it will say
    student, teacher = sketch_student(model_args), sketch(config, model_args.teacher_model_path, model_args)
    if getattr(student.config, "mm_projector_type", None) == PROJECTOR_TYPE:
        check_taf(student.config, teacher.config)
    limit = args.model_max_length
    student.config.tokenizer_model_max_length = limit
    teacher.config.tokenizer_model_max_length = limit + count_visual_tokens(teacher) - count_visual_tokens(student)
    pair = Pair(student, teacher, trains_encoder=model_args.unfreeze_mm_vision_tower)
    pair.teacher_vocab_size = None if teacher_text is None else len(teacher_text.tokenizer)
    methods = logging.getLogger("llava_compodistill.methods")
    level = methods.level
    methods.setLevel(logging.ERROR)  # what they report, they will report in earnest
    try:
        with torch.random.fork_rng(devices=[]):  # their own weights must not move the seed
            terms = prepared(args.chosen_method.terms(args.stage, args), pair)
    finally:
        methods.setLevel(level)
    if getattr(args, "hf_deepspeed_config", None) is not None and args.hf_deepspeed_config.is_zero3():
        refuse_zero3({term.name: term.calibrated_by for term in terms if term.calibrated_by})
    return terms


def check_image_layers(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Look whether the model has the layers of `--image_layers`.

    Raises:
        ValueError: naming the flag, the layers, and how many there are.
    """
    layers = parse_band(args.image_layers)
    if layers == "all":
        return
    try:
        visual_understanding_layers(read_config(model_args.model_name_or_path).num_hidden_layers, layers)
    except ValueError as error:
        raise ValueError(f"--image_layers {args.image_layers}: {error}") from None


def sketch_student(model_args: ModelArguments) -> ConfigOnly:
    """The student that a stage starts from, without its weights."""
    config = read_config(model_args.model_name_or_path)
    if getattr(config, "mm_vision_tower", None) is None:  # a base language model: the flags decide
        config.mm_vision_tower = model_args.vision_tower
        for name in (
            "mm_vision_select_layer",
            "mm_vision_select_feature",
            "mm_projector_type",
            "mm_use_im_start_end",
            "mm_use_im_patch_token",
        ):
            setattr(config, name, getattr(model_args, name))
    return sketch(config, model_args.model_name_or_path, model_args)


def sketch(config: Any, path: str, model_args: ModelArguments) -> ConfigOnly:
    """A model without its weights.

    Args:
        path: where its config comes from.

    Raises:
        CheckpointError, OSError: for a vision tower that cannot be found.
    """
    find_tower(config, path, model_args.vision_tower)
    build = import_llava("llava.model.llava_arch").build_vision_tower
    tower = SimpleNamespace(
        mm_vision_tower=config.mm_vision_tower,
        mm_vision_select_layer=config.mm_vision_select_layer,
        mm_vision_select_feature=getattr(config, "mm_vision_select_feature", "patch"),
    )
    return ConfigOnly(config, build(tower, delay_load=True))
