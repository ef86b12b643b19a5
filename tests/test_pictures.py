"""Images read ahead by workers: the same pixels in the same order, bounded, and no image that ends the others."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_compodistill.errors import DataError
from llava_compodistill.eval import pictures as module
from llava_compodistill.eval.pictures import MakePixels, Pictures, Pixels, Unreadable

pytestmark = pytest.mark.once  # nothing here depends on transformers


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of unequal sizes, and two that are none."""
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (8 + number, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def process(images, processor, config):
    """Stands for LLaVA's `process_images`."""
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * processor for image in images]


MAKE = MakePixels(process, 2.0, None, torch.float32)


def names(folder, *numbers):
    return [str(folder / f"{number}.png") for number in numbers]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_pixels_are_those_of_one_process_in_the_order_of_the_model(folder, workers):
    asked = names(folder, 5, 2, 7, 2, 0, 11, 5)
    pictures = Pictures(MAKE, workers, ahead=4)
    pictures.expect(asked)
    found = [*pictures.take(asked[:3]), *pictures.take(asked[3:4]), *pictures.take(asked[4:])]
    pictures.close()
    for name, pixels in zip(asked, found, strict=True):
        picture = np.array(Image.open(name))
        assert torch.equal(pixels.values, torch.from_numpy(picture).permute(2, 0, 1) * 2.0)
        assert pixels.size == (picture.shape[1], picture.shape[0])


def test_a_batch_may_be_taken_again_in_parts_and_others_may_come_between(folder):
    asked = names(folder, *range(8))
    pictures = Pictures(MAKE, 2, ahead=4)
    pictures.expect(asked)
    whole = pictures.take(asked[:4])
    again = [*pictures.take(asked[:2])]  # the memory did not suffice
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole, again, strict=False))
    again += pictures.take(asked[2:4])
    assert torch.equal(again[3].values, whole[3].values)
    (other,) = pictures.take(names(folder, 11))  # nobody said that it would come
    assert other.size == (10, 19)
    assert [pixels.size[1] for pixels in pictures.take(asked[4:])] == [12, 13, 14, 15]
    pictures.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(folder, workers):
    asked = [*names(folder, 0), str(folder / "broken.png"), str(folder / "empty.png"), str(folder / "gone.png")]
    asked += names(folder, 1)
    pictures = Pictures(MAKE, workers, ahead=2)
    pictures.expect(asked)
    found = pictures.take(asked)
    pictures.close()
    assert [isinstance(entry, Unreadable) for entry in found] == [False, True, True, True, False]
    assert isinstance(found[1], DataError)
    for entry, name in zip(found[1:4], asked[1:4], strict=True):
        assert str(entry).startswith(f"{name}: cannot be read as an image")


def deadly(images, processor, config):
    """A decoder that takes its process along on one kind of image."""
    if images[0].size[1] == processor and os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return process(images, 1.0, config)


PARENT = os.getpid()


def test_a_worker_that_dies_names_its_image_and_the_others_go_on(folder, caplog):
    asked = names(folder, 0, 1, 4, 2, 3)
    pictures = Pictures(MakePixels(deadly, 12, None, torch.float32), 2, ahead=4)
    pictures.expect(asked)
    found = [entry for start in (0, 2, 4) for entry in pictures.take(asked[start : start + 2])]
    pictures.close()
    assert [isinstance(entry, Unreadable) for entry in found] == [False, False, True, False, False]
    assert f"{asked[2]}: cannot be read as an image (it kills the process" in str(found[2])
    assert "worker that reads images has died" in caplog.text


def test_no_more_than_allowed_are_ahead(folder, tmp_path):
    def noted(picture):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / f"{os.path.basename(picture)}-{os.getpid()}").touch()
        return Image.open(picture).convert("RGB")

    asked = names(folder, *range(12))
    pictures = Pictures(MakePixels(process, 1.0, None, torch.float32, noted), 2, ahead=4)
    pictures.expect(asked)
    pictures.take(asked[:1])
    time.sleep(0.5)
    others = [path for path in (tmp_path / "made").iterdir() if not path.name.endswith(f"-{os.getpid()}")]
    assert 4 <= len(others) <= 5  # four wait, and the one that was taken
    pictures.close()


def test_short_shared_memory_means_fewer_ahead(folder, monkeypatch, caplog):
    size = 3 * 10 * 8 * 4  # bytes of the first picture
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * size))
    pictures = Pictures(MAKE, 4, ahead=32)
    pictures.expect(names(folder, *range(12)))
    assert pictures._room() == 2 and pictures.workers == 1 and "has room for 2 images" in caplog.text
    assert all(isinstance(entry, Pixels) for entry in pictures.take(names(folder, *range(12))))
    pictures.close()


def test_waiting_is_counted(folder):
    def slow(picture):
        time.sleep(0.05)
        return Image.open(picture).convert("RGB")

    pictures = Pictures(MakePixels(process, 1.0, None, torch.float32, slow))
    pictures.take(names(folder, 0, 1))
    assert 0.1 <= pictures.waited < 1
