"""Packs of samples (`--pack_length`): a micro-batch has about the same number of tokens, whatever its samples are.

LLaVA's instruction data have samples of 60 tokens beside such of 2,048. Samples are put together, once, into packs
that have at most `--pack_length` tokens, images included; `--per_device_train_batch_size` counts packs. The models'
layers run without padding (`record.padding`), so that a pack costs what its tokens cost, and losses, counts and L_ADL
are those of its samples: a step of the same samples is the same step.
"""

from __future__ import annotations

import bisect
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset

from ..errors import DataError
from ..hosts.llava.model import count_visual_tokens, llava_core
from .data import CheckedDataset
from .preflight.lengths import Limits, Reader, measure, packed_length

logger = logging.getLogger(__name__)

#: Packs that a sample can still be put into: enough to fill them, few beside all of them, so that chance decides.
_OPEN = 64
#: What is outside the layers, such as embeddings and maps, is padded to a pack's longest sample: at most to so many
#: times the room. Many short texts beside a long sample would make it up to ten times; LLaVA's data stay below three.
_PADDED = 3
#: Samples that a message names.
_NAMED = 3


def make_packs(lengths: Sequence[int], room: int, seed: int) -> list[list[int]]:
    """Put samples into packs, each sample in a random order into the open pack that it fills best.

    Args:
        lengths: tokens of each sample; 0 for one that is left out.
        room: tokens of a pack. A longer sample has a pack of its own.
        seed: decides the order.

    Returns:
        The samples of each pack. Every sample is in one.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    packs: list[list[int]] = []
    longest: list[int] = []
    open_packs: list[tuple[int, int]] = []  # (room that is left, number of the pack), the fullest first
    for sample in order:
        length = lengths[sample]
        if not length:
            continue
        place = bisect.bisect_left(open_packs, (length, -1))
        while place < len(open_packs):
            number = open_packs[place][1]
            if (len(packs[number]) + 1) * max(longest[number], length) <= _PADDED * room:
                break
            place += 1
        if place < len(open_packs):
            left, number = open_packs.pop(place)
        else:
            left, number = room, len(packs)
            packs.append([])
            longest.append(0)
        packs[number].append(sample)
        longest[number] = max(longest[number], length)
        if left > length:
            bisect.insort(open_packs, (left - length, number))
            if len(open_packs) > _OPEN:
                open_packs.pop(0)
    return packs


class PackedDataset(Dataset):
    """Packs of a data set's samples.

    Args:
        samples: the data set.
        packs: the samples of each pack, by their places.
    """

    def __init__(self, samples: CheckedDataset, packs: Iterable[Sequence[int]]):
        self.samples = samples
        packs = list(packs)
        # Not as lists: every worker would come to own a copy of them.
        self._ends, self._places = array("q", accumulate(map(len, packs))), array("q", chain.from_iterable(packs))

    def __len__(self) -> int:
        return len(self._ends)

    def places(self, index: int) -> list[int]:
        """The samples of a pack."""
        return self._places[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """The samples of a pack, without those that turn out not to be usable; of the next pack where none is.

        Raises:
            DataError: as the data set does.
        """
        for offset in range(len(self)):
            found = [self.samples.usable(place) for place in self.places((index + offset) % len(self))]
            if any(sample is not None for sample in found):
                return [sample for sample in found if sample is not None]
        raise DataError("No sample of the data can be used.")

    @property
    def paired(self) -> bool:
        return self.samples.paired

    @property
    def list_data_dict(self) -> Any:
        """The records of the single samples."""
        return self.samples.list_data_dict


class PackCollator:
    """Collates the samples of packs as a batch of samples; single samples as they are.

    Args:
        collator: of single samples.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        return self.collator([sample for item in items for sample in (item if isinstance(item, list) else [item])])


def limits_of(student: nn.Module, teacher: nn.Module | None) -> Limits:
    """What a sample's images take, and where it is cut, in the model that makes the longer sequence of it."""
    core = llava_core(student)
    limit, patches = core.config.tokenizer_model_max_length, count_visual_tokens(core)
    if teacher is None:
        return Limits(patches, limit, patches, limit)
    theirs = count_visual_tokens(teacher)
    limit = max(limit, getattr(teacher.config, "tokenizer_model_max_length", None) or 0)
    return Limits(max(patches, theirs), limit, theirs, limit)


def pack_data(module: dict[str, Any], limits: Limits, template: Any, args: Any) -> dict[str, Any]:
    """The Trainer's data arguments with packs in place of samples.

    Args:
        module: what `make_data_module` gives.
        limits: of the pair.
        template: the conversation template in force.
        args: room and seed, and what the lengths are measured with: its ranks and their workers.

    Raises:
        DataError: for a sample whose text cannot be used (`--bad_samples skip` leaves it out), or that ends training.
    """
    samples, start = module["train_dataset"], time.perf_counter()
    lengths = merged_lengths(samples, limits, template, args)
    packs = make_packs(lengths, args.pack_length, args.seed_of_data)
    if not packs:
        raise DataError("No sample of the data can be used.")
    _name_long_ones(samples, lengths, args.pack_length)
    tokens, used = sum(lengths), sum(map(len, packs))
    logger.info(
        "--pack_length %d: %d samples in %d packs, %.1f each; on average a pack is %.1f %% full. (%.1f s)",
        *(args.pack_length, used, len(packs), used / len(packs), 100 * tokens / len(packs) / args.pack_length),
        time.perf_counter() - start,
    )
    return {
        "train_dataset": PackedDataset(samples, packs),
        "data_collator": PackCollator(module["data_collator"]),
    }


def merged_lengths(samples: CheckedDataset, limits: Limits, template: Any, args: Any) -> list[int]:
    """Tokens of each sample once its images are merged in and the limit has cut it, of both answers where samples are
    pairs; 0 for one that cannot be used. Each rank reads its share of the texts."""
    reader = Reader(samples, limits, template)
    mine = range(args.process_index, len(samples), args.world_size)
    readings = measure(reader, mine, max(1, args.dataloader_num_workers), flag="--dataloader_num_workers")
    found = [
        (reading.place, packed_length(reading, limits, samples.paired), reading.problem, reading.fatal)
        for reading in readings
    ]
    lengths = [0] * len(samples)
    # On all ranks alike, so that none waits for one that has ended.
    for place, length, problem, fatal in sorted(chain.from_iterable(gather_object([found])), key=lambda one: one[0]):
        if fatal:
            raise DataError(f"{samples.name_of(place)}: {problem}")
        if problem is None:
            lengths[place] = length
        else:
            samples.pass_over(place, problem)
    return lengths


def _name_long_ones(samples: CheckedDataset, lengths: Sequence[int], room: int) -> None:
    long = [place for place, length in enumerate(lengths) if length > room]
    if not long:
        return
    named = "; ".join(f"{samples.name_of(place)}: {lengths[place]} tokens" for place in long[:_NAMED])
    logger.warning(
        "%d samples are longer than --pack_length %d: %s%s. Each is trained whole, in a pack of its own, and the "
        "memory of a step is that of the longest, %d tokens. --pack_length of at least that avoids it, and so does a "
        "lower --model_max_length, which cuts them.",
        *(len(long), room, named, "; …" if len(long) > _NAMED else "", max(lengths)),
    )
