"""Pixels by a table are the processor's own, bit for bit, or the processor makes them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from llava_compodistill.hosts.llava.pixels import TablePixels, quick

SIGLIP = {"size": {"height": 56, "width": 56}}
CLIP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PROCESSORS = [
    (SiglipImageProcessor, SIGLIP),
    (SiglipImageProcessor, {**SIGLIP, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.3, 0.11]}),
    (SiglipImageProcessor, {**SIGLIP, "resample": 2, "do_normalize": False}),
    (CLIPImageProcessor, CLIP),
    (CLIPImageProcessor, {**CLIP, "crop_size": {"height": 48, "width": 50}}),
]


def made(kind, options):
    processor = kind(**options)
    found = quick(processor)
    if type(found) is not TablePixels and getattr(processor, "backend", "pil") == "torchvision":
        pytest.skip("torchvision resizes otherwise")
    return processor, found


def picture(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind, options", PROCESSORS)
def test_pixels_are_the_processors(kind, options):
    processor, found = made(kind, options)
    assert type(found) is TablePixels and found.always_finite
    for size in ((56, 56), (57, 56), (640, 480), (31, 90), (300, 20), (1, 4)):
        image = picture(*size)
        theirs = processor.preprocess(image, return_tensors="pt")["pixel_values"]
        mine = found.preprocess(image, return_tensors="pt")["pixel_values"]
        assert mine.dtype == theirs.dtype and torch.equal(torch.as_tensor(theirs), mine)
    several = [picture(60, 60), picture(80, 70)]
    theirs = processor(several, return_tensors="pt")["pixel_values"]
    assert torch.equal(pickle.loads(pickle.dumps(found))(several, return_tensors="pt")["pixel_values"], theirs)
    assert found.image_mean == processor.image_mean and found.size == processor.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_pixels(dtype):
    processor, found = made(*PROCESSORS[1])
    found.round_to(dtype)
    image = picture(60, 50)
    mine = found.preprocess(image, return_tensors="pt")["pixel_values"]
    theirs = torch.as_tensor(processor.preprocess(image, return_tensors="pt")["pixel_values"])
    assert mine.dtype == dtype and torch.equal(mine, theirs.to(dtype))


def test_the_table_is_what_runs(monkeypatch):
    processor, found = made(*PROCESSORS[0])
    expected = found.preprocess(picture(60, 50), return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(processor, "preprocess", None)
    assert torch.equal(found.preprocess(picture(60, 50), return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(TypeError, match="not callable"):  # other options, and other images, are the processor's
        found.preprocess(picture(60, 50), return_tensors="np")
    for other in (picture(60, 50).convert("L"), picture(60, 3)):
        with pytest.raises(TypeError, match="not callable"):
            found.preprocess(other, return_tensors="pt")


def test_what_the_processor_pads_is_left_to_it():
    processor, found = made(CLIPImageProcessor, {**CLIP, "crop_size": {"height": 64, "width": 60}})
    assert found is processor
    assert quick(None) is None and quick(nothing := object()) is nothing


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    "change", [{"image_std": [0.0, 0.0, 0.0]}, {"size": {"longest_edge": 56, "shortest_edge": 40}}]
)
def test_other_pixels_are_left_to_the_processor(change):
    processor = SiglipImageProcessor(**{**SIGLIP, **change})
    assert quick(processor) is processor


def test_a_processor_that_looks_at_more_than_a_pixel_stays():
    class Other(SiglipImageProcessor):
        def preprocess(self, images, **options):
            found = super().preprocess(images, **options)
            values = torch.as_tensor(found["pixel_values"])
            found["pixel_values"] = values - values.mean()
            return found

    processor = Other(**SIGLIP)
    assert quick(processor) is processor
