"""Images encoded once for both models of a pair, or by each model's own encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..hosts import host_of
from ..hosts.base import sent
from ..hosts.llava.model import projector
from ..pair import Pair
from ..pair.vision import IDENTITY, renormalisation
from .patch import replaced


@contextlib.contextmanager
def encode_for(pair: Pair) -> Iterator[None]:
    """Inside the context the teacher's forward, and then the student's, encode a batch's images as the pair does."""
    if pair.teacher is None or pair.cached:
        yield
    elif pair.shares_encoder:
        with encode_once(pair):
            yield
    else:
        with encode_separately(pair.student, pair.teacher):
            yield


@contextlib.contextmanager
def encode_once(pair: Pair) -> Iterator[None]:
    """Inside the context the teacher's forward encodes the images and the student's, which follows, reuses the result.

    That is the encoder's features, and under TAF the teacher's visual tokens as well, since P_T is the same weights on
    the same pixels in both models (paper, Section 4.2).
    """
    student, teacher = pair.student, pair.teacher
    theirs, mine = host_of(teacher), host_of(student)
    encoded: list[torch.Tensor] = []

    def encode_for_both(images: torch.Tensor) -> torch.Tensor:
        features = teacher.get_vision_tower()(images)
        tokens = theirs.project(teacher, features)
        encoded.append(tokens if pair.shares_adapter else features)
        return tokens

    def reuse(images: torch.Tensor) -> torch.Tensor:
        if not encoded:
            raise RuntimeError("encode_once: run the teacher's forward before the student's.")
        if pair.shares_adapter:
            return projector(student)(encoded.pop(), from_teacher=True)
        return mine.project(student, encoded.pop())

    with replaced(teacher, theirs.ENCODE, encode_for_both), replaced(student, mine.ENCODE, reuse):
        yield


@contextlib.contextmanager
def keep_features(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the context a forward leaves the features of the model's own encoder in the list, with their graph."""
    host = host_of(model)
    kept: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        kept.append(model.get_vision_tower()(images))
        return host.project(model, kept[-1])

    with replaced(model, host.ENCODE, encode):
        yield kept


@contextlib.contextmanager
def encode_alone(model: nn.Module) -> Iterator[None]:
    """Inside the context a forward encodes its images by the model's own tower and adapter, which may differ in
    precision, whoever shares them."""
    host = host_of(model)
    with replaced(model, host.ENCODE, lambda images: host.project(model, model.get_vision_tower()(images))):
        yield


@contextlib.contextmanager
def keep_tokens(model: nn.Module) -> Iterator[None]:
    """Inside the context the first forward makes visual tokens of its images, and those that follow, of the same
    images, reuse them."""
    host = host_of(model)
    encode = getattr(model, host.ENCODE)
    kept: list[torch.Tensor] = []

    def encode_first(images: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(encode(images))
        return kept[0]

    with replaced(model, host.ENCODE, encode_first):
        yield


@contextlib.contextmanager
def encoded_as(model: nn.Module, features: torch.Tensor) -> Iterator[None]:
    """Inside the context a forward's images have these features [B, N_v, D_v], whatever its own encoder says."""
    host = host_of(model)
    with replaced(model, host.ENCODE, lambda images: host.project(model, features)):
        yield


@contextlib.contextmanager
def encode_separately(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Inside the context the teacher encodes the images with a tower of its own, although they were prepared for the
    student's: in its size, normalised its way, and in its precision, which a teacher in bf16 beside a student in fp32
    would refuse.
    """
    host = host_of(teacher)
    student, teacher = host_of(student).core(student), host.core(teacher)
    scale, shift = renormalisation(
        student.get_vision_tower().image_processor, teacher.get_vision_tower().image_processor
    )

    size = teacher.get_vision_tower().config.image_size

    def encode(images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != size:
            options = {"mode": "bicubic", "align_corners": False, "antialias": True}
            images = F.interpolate(images.float(), size=(size, size), **options).to(images.dtype)
        if (scale, shift) != IDENTITY:
            factor, summand = (sent(torch.tensor(part).to(images.dtype), images.device) for part in (scale, shift))
            images = images * factor.view(3, 1, 1) + summand.view(3, 1, 1)
        return host.project(teacher, teacher.get_vision_tower()(images))

    with replaced(teacher, host.ENCODE, encode):
        yield
