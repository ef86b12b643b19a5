"""Orders of the data that a seed and an epoch fix: the same after resuming, and on every rank."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import Sampler

from ..hosts.llava.training import LengthGroupedSampler


class SeededRandomSampler(Sampler):
    """A shuffled order that depends on the seed and the epoch alone."""

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return iter(
            torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        )


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """LLaVA's grouping by modality and length, drawn from the seed and the epoch instead of the global state, so that
    a resumed run sees the order of an unbroken one."""

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            return iter(list(super().__iter__()))


def samples_of(dataset: Any) -> Any:
    """The data set of single samples behind one that may hand out packs of them (`packing`)."""
    return getattr(dataset, "samples", dataset)


class TellEpoch(transformers.TrainerCallback):
    """Tell the sampler its epoch: on several ranks older releases of accelerate do not."""

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = self.trainer.train_sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))
