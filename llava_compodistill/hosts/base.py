"""What every code base that a model can come from has to answer, so that the rest need not know which it is.

A host encodes images, merges them into the text, names the decoder's layers and its head, and loads checkpoints
(`hosts.load_model`). What it answers is data and module references; only `record/` puts anything around a model's
methods.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

IGNORE_INDEX = -100

#: (a tensor on its device, the copy of it that the CPU has kept)
Kept = tuple[torch.Tensor, torch.Tensor]
_kept: contextvars.ContextVar[Sequence[Kept]] = contextvars.ContextVar("kept", default=())


@contextlib.contextmanager
def kept_on_cpu(tensors: Sequence[Kept]) -> Iterator[None]:
    """Inside the context `on_cpu` finds the copies of these tensors, which are equal to them.

    What a batch is like (where its images and its answers are) decides the shapes of all that follows. The collator
    knows it on the CPU; to ask the device would wait for all that is queued there.
    """
    token = _kept.set((*_kept.get(), *tensors))
    try:
        yield
    finally:
        _kept.reset(token)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the CPU's memory: itself, the copy that was kept, or, which waits for the device, a new one."""
    for there, here in _kept.get():
        if there is tensor:
            return here
    return tensor.cpu()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device, which is not waited for; itself where that is the CPU."""
    if device.type == "cpu":
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from pageable memory the copy would wait for all that is queued
    return tensor.to(device, non_blocking=True)


@dataclass
class MergedBatch:
    """What the merge of images into text did to a batch of B samples, padded to N positions.

    Attributes:
        labels: [B, N], IGNORE_INDEX at visual tokens, prompts and padding.
        real: [B, N] bool, False at padding.
        visual_index: [B, N_v] positions of the visual tokens, -1 where a sample has fewer than the batch's maximum.
        left_padded: whether padding stands before the real tokens, where a causal model's real rows would see it.
        cpu: the same in the CPU's memory, from which `places` and `counts` are read without waiting for a device.
    """

    labels: torch.Tensor
    real: torch.Tensor
    visual_index: torch.Tensor
    left_padded: bool = False
    cpu: MergedBatch | None = field(default=None, repr=False, compare=False)
    _places: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls, labels: torch.Tensor, real: torch.Tensor, visual: torch.Tensor, left: bool, device: torch.device
    ) -> MergedBatch:
        """A batch on a device, from what the CPU knows of it.

        Args:
            labels, real, visual: [B, N], the latter True at visual tokens.
            left: whether it is left-padded.
        """
        here = cls(labels, real, _positions(visual), left)
        return cls(*(sent(part, device) for part in (labels, real, here.visual_index)), left, here)

    def on_cpu(self) -> MergedBatch:
        """The batch in the CPU's memory; where it has not come from there, that waits for the device."""
        if self.cpu is None:
            if self.labels.device.type == "cpu":
                return self
            return MergedBatch(self.labels.cpu(), self.real.cpu(), self.visual_index.cpu(), self.left_padded)
        return self.cpu

    def places(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """([R], [R]): sample and position of each of the rows of a name (see `rows`), in reading order. Indexing with
        them is what indexing with the mask is, for forward and backward, without asking the device how many it has."""
        if name not in self._places:
            here = self.on_cpu().rows(name).nonzero(as_tuple=True)
            self._places[name] = tuple(sent(index, self.labels.device) for index in here)
        return self._places[name]

    def counts(self, name: str) -> list[int]:
        """For each sample the number of its rows of a name (see `rows`)."""
        return self.on_cpu().rows(name).sum(dim=1).tolist()

    @property
    def in_order(self) -> bool:
        """Whether each sample's visual tokens are known to ascend in `visual_index`, as `of` lists them."""
        return self.cpu is not None

    @property
    def visual(self) -> torch.Tensor:
        """[B, N] bool, True at visual tokens."""
        # Padding goes to a column of its own, which is cut off: no wait for the device, as boolean indexing would.
        length = self.real.shape[1]
        mask = torch.zeros(len(self.real), length + 1, dtype=torch.bool, device=self.real.device)
        mask.scatter_(1, self.visual_index.where(self.visual_index >= 0, length), True)
        return mask[:, :length]

    @property
    def has_image(self) -> torch.Tensor:
        """[B] bool."""
        if self.visual_index.shape[1] == 0:
            return torch.zeros(len(self.visual_index), dtype=torch.bool, device=self.visual_index.device)
        return self.visual_index[:, 0] >= 0

    def answer_mask(self) -> torch.Tensor:
        """[B, N] bool: the positions that predict an answer token (the label at i + 1; causal shift)."""
        mask = torch.zeros_like(self.real)
        mask[:, :-1] = self.labels[:, 1:] != IGNORE_INDEX
        return mask

    def answer_targets(self) -> torch.Tensor:
        """[R]: the labels predicted at `answer_mask`, in its order."""
        sample, position = self.places("answer")
        return self.labels[sample, position + 1]

    def rows(self, name: str) -> torch.Tensor:
        """[B, N] bool: the positions of a name.

        Args:
            name: all (that are not padding), answer (that predict an answer token), labelled (that are one), text or
                visual.
        """
        if name == "all":
            return self.real
        if name == "answer":
            return self.answer_mask()
        if name == "labelled":
            return self.labels != IGNORE_INDEX
        if name == "visual":
            return self.visual
        if name == "text":
            return self.real & ~self.visual
        raise ValueError(f"rows {name!r}: must be all, answer, labelled, text or visual.")

    def attention_rows(self, rows: str = "all") -> torch.Tensor:
        """[B, N] bool: the queries that count in L_ADL: not padding, with a visual key at or before them.

        Args:
            rows: as for `rows`.
        """
        return self.real & (self.visual.long().cumsum(dim=1) > 0) & self.rows(rows)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """[B, N] bool -> [B, most True in a row], their positions in order, padded with -1."""
    counts = mask.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    index = torch.full((mask.shape[0], width), -1, dtype=torch.long, device=mask.device)
    batch, position = mask.nonzero(as_tuple=True)
    column = mask.long().cumsum(dim=1)[batch, position] - 1
    index[batch, column] = position
    return index


class Host(Protocol):
    """The questions. Functions of a module will do: `hosts/llava/model.py` is one."""

    #: Names of the methods that merge images into text and that encode images, which `record/` wraps on an instance.
    MERGE: str
    ENCODE: str

    def core(self, model: nn.Module) -> nn.Module:
        """The multimodal causal language model inside any wrapper (DDP, DeepSpeed, PEFT).

        Raises:
            TypeError: when there is none of this host's.
        """

    def recording_merge(
        self,
        core: nn.Module,
        merge: Callable[..., Any],
        received: Callable[[MergedBatch], None],
        embed_once: bool = False,
    ) -> Callable[..., Any]:
        """A function that stands in for the model's MERGE, and hands out what it did; with `embed_once` it calls the
        embedding once a batch, however many samples that has."""

    def text_alone(self, inputs: Mapping[str, Any], samples: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some samples [S] of a batch, as the host's collator would make them if they had no images."""

    def backbone(self, core: nn.Module) -> nn.Module:
        """The decoder without its head."""

    def decoder_layers(self, core: nn.Module) -> list[nn.Module]:
        """First layer first; each has its self-attention under `self_attn`."""

    def head(self, core: nn.Module) -> nn.Module:
        """[…, D] -> [..., V]."""

    def routers(self, core: nn.Module) -> dict[int, nn.Module]:
        """By the numbers of their layers, the modules that route tokens to experts; empty for a dense model. Each
        returns a routing with `balance` and `dropped`, [B], and leaves out what its attribute `real` calls padding."""

    def project(self, core: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """Features of the encoder [B, N_v, D_v] -> visual tokens [B, N_v, D]."""
