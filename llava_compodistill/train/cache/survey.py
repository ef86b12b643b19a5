"""What there is of a cache that is gone on with, and whether it is of these data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import CacheError
from ..data import CheckedDataset
from . import shards
from .read import differences

logger = logging.getLogger(__name__)

Block = tuple[int, int]
#: Shards of which a sample is compared with the data, evenly spread.
_LOOKED_AT = 64


def survey(dataset: CheckedDataset, folder: Path, blocks: Sequence[Block]) -> tuple[list[Block], list[Block]]:
    """(the blocks that are to be made, those whose shards are whole). To be made are also those with a sample that
    could not be read then, and can be now.

    Raises:
        CacheError: where shards hold other data.
    """
    index: Mapping[str, Any] = {}
    if (folder / shards.INDEX_FILE).is_file():
        try:
            index = shards.read_index(folder)
        except CacheError as error:
            logger.warning("%s It is written anew.", error)
    todo, whole = [], []
    for block in blocks:
        path = folder / shards.shard_name(*block)
        problem = shards.damage(path, index.get(path.name))
        (whole if problem is None else todo).append(block)
        if problem not in (None, "is missing"):
            logger.warning("%s %s: it is made anew.", path, problem)
    refuse_other_data(dataset, folder, whole, dataset.read_text)
    for block in list(whole):
        name = _now_readable(dataset, folder, block)
        if name is not None:
            logger.warning(
                "%s could not be read before and was left out. It can be read now, so %s is made again.",
                name,
                shards.shard_name(*block),
            )
            whole.remove(block)
            todo.append(block)
    return sorted(todo), whole


def refuse_other_data(
    dataset: CheckedDataset, folder: Path, whole: Sequence[Block], read: Callable[[int], Mapping[str, Any]]
) -> None:
    """Compare a sample of some shards with the data.

    Args:
        read: gives a sample: `read_text` of the data set, or `read`, whose pixels are compared as well.

    Raises:
        CacheError: naming the first that differs.
    """
    chosen = sorted({number * len(whole) // _LOOKED_AT for number in range(_LOOKED_AT)}) if whole else []
    for block in (whole[number] for number in chosen):
        shard = shards.Shard(folder / shards.shard_name(*block))
        left_out = set(shard.left_out())
        place = next((place for place in range(shard.samples) if place not in left_out), None)
        if place is None:
            continue
        position = block[0] + place
        name = dataset.name_of(position)
        try:
            sample = read(position)
        except Exception as error:
            cause = dataset.fault(error)
            if cause is None:
                raise
            raise CacheError(
                f"--output {folder} holds {name}, which cannot be read any more ({cause}). Restore it, or name "
                "another folder."
            ) from None
        changed = differences(shard.read(place), sample)
        if changed is not None:
            raise CacheError(
                f"--output {folder} holds a cache of other data: {name} is not what the teacher has read. Its "
                f"{changed} differ. To continue, give the data that the cache was made from (--data_path, "
                "--image_folder, --seed); otherwise name another folder."
            )


def _now_readable(dataset: CheckedDataset, folder: Path, block: Block) -> str | None:
    """A sample of a shard that was left out and can be read; None where there is none."""
    for place in shards.Shard(folder / shards.shard_name(*block)).left_out():
        position, kept = block[0] + place, getattr(dataset.data_args, "image_processor", None)
        dataset.data_args.image_processor = _Decoder()
        try:
            dataset.read(position)
        except Exception as error:
            if dataset.fault(error) is None:
                raise
        else:
            return dataset.name_of(position)
        finally:
            dataset.data_args.image_processor = kept
    return None


class _Decoder:
    """In an image processor's place where the teacher, whose it is, is not loaded: the image is decoded, no more."""

    image_mean = (0.0, 0.0, 0.0)
    crop_size = size = {"height": 1, "width": 1}

    def preprocess(self, image: Any, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 3, 1, 1)}
