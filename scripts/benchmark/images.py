"""Suite images: how long the evaluation engine waits for images, read beside it or ahead of it by workers.

The model is a sleep of 30 ms a batch, as a GPU that is busy so long; the images are JPEGs of 384 x 384, read and
preprocessed for SigLIP as an evaluation does it. Larger batches in the same time need more images a second, up to
where the cores do not suffice: what one core makes is the first row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_compodistill.eval.pictures import MakePixels, Pictures
from llava_compodistill.hosts.llava import import_llava

SIZE, COUNT = 384, 240
STEP = 0.030
#: Images a batch, of which each takes `STEP`.
BATCHES = (1, 4, 8, 16, 32)
WORKERS = (0, 1, 2)
ROUNDS = 3


def write_images(folder: Path, size: tuple[int, int] = (SIZE, SIZE), count: int = COUNT) -> list[str]:
    """JPEGs of quality 90 with structure at every scale, as photographs have it.

    Args:
        size: (width, height).
    """
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        pixels = np.zeros((*size[::-1], 3))
        for cells in (3, 12, 48, 192):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / (cells / 3) ** 0.5
        pixels *= 255 / pixels.max()
        names.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels.astype(np.uint8)).save(names[-1], quality=90)
    return names


def make_pixels() -> MakePixels:
    """For SigLIP so400m at 384 x 384, whose processor needs no weights."""
    from transformers import PretrainedConfig, SiglipImageProcessor

    processor = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    processor.crop_size = processor.size
    process = import_llava("llava.mm_utils").process_images
    return MakePixels(process, processor, PretrainedConfig(image_aspect_ratio=None), torch.bfloat16)


def run(folder: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    names, make = write_images(Path(folder)), make_pixels()
    expected = [make(name).values for name in names[:8]]
    started = time.perf_counter()
    for name in names:
        make(name)
    rate = COUNT / (time.perf_counter() - started)
    common = {"suite": "images", "rows": COUNT, "dtype": "bfloat16"}
    size = np.mean([os.path.getsize(name) for name in names]) / 1024
    note = f"JPEG {SIZE} x {SIZE}, {size:.0f} KiB; open, decode, preprocess"
    yield {**common, "variant": "one core", "samples_per_s": rate, "note": note}
    for batch in BATCHES:
        for workers in WORKERS:
            tries = [measure(names, make, batch, workers) for _ in range(ROUNDS)]
            share, speed, pixels = sorted(tries, key=lambda entry: entry[0])[ROUNDS // 2]
            same = all(torch.equal(a, b) for a, b in zip(pixels, expected, strict=False))
            row = {**common, "variant": f"{workers} workers", "batch": batch, "parity": "equal" if same else "FAILED"}
            note = f"waits {100 * share:.1f} % of the time; needs {batch / STEP:.0f} images a second"
            yield {**row, "samples_per_s": speed, "note": note}


def measure(names: list[str], make: MakePixels, batch: int, workers: int) -> tuple[float, float, list[torch.Tensor]]:
    """(share of the time that the model waits, images a second, the first batches' pixels), behind the first batches:
    an evaluation is long, its beginning is not."""
    pictures = Pictures(make, workers, ahead=32)
    pictures.expect(names)
    first, began, waited = [], 0.0, 0.0
    skipped = 40 // batch * batch
    for start in range(0, len(names), batch):
        if start == skipped:
            began, waited = time.perf_counter(), pictures.waited
        pixels = pictures.take(names[start : start + batch])
        if start < 8:
            first += [entry.values for entry in pixels]
        time.sleep(STEP)
    took = time.perf_counter() - began
    pictures.close()
    return (pictures.waited - waited) / took, (len(names) - skipped) / took, first
