"""A student and its teacher, as the losses see them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..hosts.llava.model import count_visual_tokens, llava_core, projector
from ..hosts.llava.taf import TAFProjector
from .vision import check_taf, has_adapter_of, same_tower, share_tower

logger = logging.getLogger(__name__)


@dataclass
class Pair:
    """Two models that read the same batches.

    Attributes:
        student, teacher: multimodal language models without their wrappers; the teacher is None where none is needed.
        vocab_size: size of the student's real vocabulary, which both share unless `teacher_vocab_size` is given.
        teacher_vocab_size: that of a teacher whose tokenizer is another than the student's.
        shares_encoder: whether images are encoded once for both.
        shares_adapter: whether the student's frozen adapter is this teacher's, so that it runs once for both, too.
        trains_encoder: whether the student's encoder is trained in this stage.
        cached: whether the teacher is a config and a tower's sizes alone, and its passes come from a cache.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    vocab_size: int | None = None
    shares_encoder: bool = False
    shares_adapter: bool = False
    teacher_vocab_size: int | None = None
    trains_encoder: bool = False
    cached: bool = False

    @classmethod
    def of(
        cls,
        student: nn.Module,
        teacher: nn.Module | None,
        vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
    ) -> Pair:
        """Put two models together: towers are shared where they agree, sequences are cut at the same length.

        Args:
            student: wrapped in PEFT or not.

        Raises:
            ValueError: for towers that do not go together, naming both.
        """
        student = llava_core(student)
        if teacher is None:
            return cls(student, None, vocab_size)
        trains_encoder = any(parameter.requires_grad for parameter in student.get_vision_tower().parameters())
        shares_encoder = not trains_encoder and same_tower(student.config, teacher.config)
        pair = cls(student, teacher, vocab_size, shares_encoder, trains_encoder=trains_encoder)
        pair.teacher_vocab_size = teacher_vocab_size
        if isinstance(projector(student), TAFProjector):
            check_taf(student.config, teacher.config)
        pair.cached = not isinstance(teacher, nn.Module)
        pair.shares_adapter = pair.shares_encoder and not pair.cached and has_adapter_of(student, teacher)
        # The sequences must be cut behind the same text for their rows to correspond.
        limit = getattr(student.config, "tokenizer_model_max_length", None)
        if limit is not None and not pair.shares_encoder:
            limit += count_visual_tokens(teacher) - count_visual_tokens(student)
        teacher.config.tokenizer_model_max_length = limit
        teacher.config.tokenizer_padding_side = getattr(student.config, "tokenizer_padding_side", "right")
        return pair

    @property
    def shares_tokenizer(self) -> bool:
        """Whether both models read a sample as the same tokens."""
        return self.teacher_vocab_size is None

    @property
    def vocab_sizes(self) -> tuple[int | None, int | None]:
        """The real vocabularies of the student and of the teacher; None where it is not known."""
        return self.vocab_size, self.vocab_size if self.shares_tokenizer else self.teacher_vocab_size

    @property
    def pixel_dtype(self) -> torch.dtype | None:
        """The precision of 16 bits to which images can be rounded before they travel, so that every number that is
        made of them stays what it is; None to leave them as they are. (A cache knows samples by their pixels.)

        The encoder rounds them to its own as the first thing that it does, and gives its features back in the images'
        own, which an adapter with weights rounds to its own. A teacher with another encoder may resize or normalise
        them anew before it rounds.
        """
        dtype = self.student.get_vision_tower().dtype
        if self.cached:
            return None
        adapters = [projector(model) for model in (self.student, self.teacher) if model is not None]
        rounded = dtype in (torch.bfloat16, torch.float16) and (self.teacher is None or self.shares_encoder)
        return dtype if rounded and all(next(adapter.parameters(), None) is not None for adapter in adapters) else None

    @property
    def longest(self) -> int | None:
        """The length that sequences are cut at, images included; None where there is no limit."""
        return getattr(self.student.config, "tokenizer_model_max_length", None)

    def share_vision(self) -> None:
        """Let both use one encoder where they can, and say what runs."""
        if self.cached:
            return
        if not self.shares_encoder:
            sizes = [model.get_vision_tower().config.image_size for model in (self.student, self.teacher)]
            resized = "" if sizes[0] == sizes[1] else f", resized from {sizes[0]} to {sizes[1]} pixels for the teacher"
            reason = "the student's tower is trained" if self.trains_encoder else "the towers differ"
            logger.info("Vision: %s, so each model encodes the images itself%s.", reason, resized)
            return
        share_tower(self.student, self.teacher)
        if isinstance(projector(self.student), TAFProjector) and not self.shares_adapter:
            logger.warning(
                "The student's frozen adapter does not match this teacher's. Was the student distilled from another "
                "teacher? Each model keeps its own adapter."
            )
        both = "encoder and teacher adapter run" if self.shares_adapter else "encoder runs"
        logger.info("Vision: the %s once a batch for both models.", both)
