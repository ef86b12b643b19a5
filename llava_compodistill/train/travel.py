"""How batches come to the device: with pixels in the precision of the model, from pinned memory, unwaited for.

The Trainer pins by default (`--dataloader_pin_memory`), lists of images and what a teacher reads included, but waits
for the copy, by default (transformers 4.41 and later have a setting for it, `--accelerator_config`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers.trainer

from ..hosts.llava.pixels import TablePixels
from ..pair import Pair
from ..record.patch import replaced
from .samplers import samples_of


def pixel_dtype(pair: Pair, data: Any) -> torch.dtype | None:
    """The precision in which the collator hands out images (`Pair.pixel_dtype`), None for the data's own; a data set
    whose pixels come from a table has them in it from there on."""
    dtype = pair.pixel_dtype
    processor = getattr(getattr(samples_of(data), "data_args", None), "image_processor", None)
    if dtype is not None and isinstance(processor, TablePixels):
        processor.round_to(dtype)
    return dtype


@contextlib.contextmanager
def resuming_without_waiting(args: Any) -> Iterator[None]:
    """Inside, so is the loader that accelerate makes anew to skip the batches that a resumed run has seen."""
    skip = transformers.trainer.skip_first_batches

    def skipped(*given: Any, **options: Any) -> Any:
        return without_waiting(skip(*given, **options), args)

    with replaced(transformers.trainer, "skip_first_batches", skipped):
        yield


def without_waiting(loader: Any, args: Any) -> Any:
    """A data loader, as accelerate has prepared it, whose copies from pinned memory to a GPU are not waited for."""
    if args.dataloader_pin_memory and args.device.type == "cuda":
        loader._non_blocking = True
    return loader
