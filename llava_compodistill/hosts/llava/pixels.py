"""Pixels by a table: what CLIP's and SigLIP's image processors give, in less time.

Once an image is resized, its processor rescales and normalises numbers from 0 to 255, channel by channel: 256 results
a channel. They are taken from the processor itself, and before the table is used its pixels are compared with the
processor's, bit for bit. Where they differ (a backend that resizes otherwise than PIL), the processor stays.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

logger = logging.getLogger(__name__)

#: (width, height) of images on which the pixels are compared: enlarged, reduced, wide, high.
_SIZES = ((45, 38), (701, 640), (400, 71), (90, 310))


class TablePixels:
    """Stands for an image processor, and passes what it does not know on to it.

    Args:
        processor: of transformers, with `image_mean` and the like.

    Attributes:
        always_finite: no image gives a pixel that is NaN or infinite.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        options = {"do_resize": False, "return_tensors": "pt"}
        if hasattr(processor, "do_center_crop"):
            options["do_center_crop"] = False
        values = processor.preprocess(Image.fromarray(levels), **options)["pixel_values"][0]
        self._table, self._dtype = values.reshape(3, 256), values.dtype
        self.always_finite = bool(torch.isfinite(self._table).all())

    def round_to(self, dtype: torch.dtype) -> None:
        """From now on give pixels as `Tensor.to(dtype)` rounds them: half the memory, and nothing to round later."""
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "processor":  # also where pickle makes one without __init__
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> Any:
        """As the processor's own; by the table for PIL images in RGB and no option but `return_tensors="pt"`."""
        several = images if isinstance(images, (list, tuple)) else [images]
        if options == {"return_tensors": "pt"} and several:
            found = [self._pixels(image) for image in several]
            if all(pixels is not None for pixels in found):
                return BatchFeature({"pixel_values": torch.stack(found) if len(found) > 1 else found[0][None]})
        return self.processor.preprocess(images, **options)

    def _pixels(self, image: Any) -> torch.Tensor | None:
        """[3, H, W] of an image; None where that is left to the processor."""
        if not isinstance(image, Image.Image) or image.mode != "RGB" or image.height <= 3:
            return None  # of 1 or 3 rows transformers 4.37 reads the first as channels
        processor = self.processor
        if processor.do_resize:
            image = image.resize(_resized(image.size, processor.size), processor.resample)
        if getattr(processor, "do_center_crop", False):
            width, height = (processor.crop_size[name] for name in ("width", "height"))
            if image.width < width or image.height < height:
                return None  # which it would pad
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        levels = np.asarray(image)
        table = self._table.to(self._dtype)
        values = table.view(torch.int16).numpy() if table.element_size() == 2 else table.numpy()  # bfloat16 is none
        pixels = np.empty((3, *levels.shape[:2]), values.dtype)
        for channel in range(3):
            np.take(values[channel], levels[:, :, channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels).view(table.dtype)


def quick(processor: Any) -> Any:
    """A processor that gives the same pixels sooner; the processor itself where there is none."""
    try:
        found = TablePixels(processor)
        same = found.always_finite and all(_equal(found, processor, size) for size in _sizes(processor))
    except Exception as error:  # a processor of any kind, asked for what it may not know
        logger.info("Images are preprocessed by %s itself (%s).", type(processor).__name__, error)
        return processor
    if not same:
        name = type(processor).__name__
        logger.info("Images are preprocessed by %s itself, whose pixels a table does not give.", name)
        return processor
    return found


def _sizes(processor: Any) -> list[tuple[int, int]]:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return [*_SIZES, (size["width"], size["height"])]


def _equal(found: TablePixels, processor: Any, size: tuple[int, int]) -> bool:
    rng = np.random.default_rng(size[0])
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    mine = found._pixels(image)
    theirs = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    return mine is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _resized(size: tuple[int, int], target: Any) -> tuple[int, int]:
    """(width, height) that a processor's `size` gives an image of another."""
    # A dictionary, or since transformers 5 an object.
    ask = target.get if isinstance(target, Mapping) else functools.partial(_attribute, target)
    edge = ask("shortest_edge")
    if edge is None:
        return ask("width"), ask("height")
    if ask("longest_edge") is not None:
        raise ValueError("sizes between two edges")
    width, height = size
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _attribute(target: Any, name: str) -> Any:
    return getattr(target, name, None)
