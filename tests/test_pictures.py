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
from torch.utils.data import DataLoader, dataloader

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


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """PyTorch asks every five seconds whether its workers are alive, and waits as long for their end."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))
    monkeypatch.setattr(dataloader._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)


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
    again = pictures.take(asked[:2])  # the memory did not suffice
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole, again, strict=False))
    again += pictures.take(asked[2:4])
    assert torch.equal(again[3].values, whole[3].values)
    (other,) = pictures.take(names(folder, 11))  # nobody said that it would come
    assert other.size == (10, 19)
    assert [pixels.size[1] for pixels in pictures.take(asked[4:])] == [12, 13, 14, 15]
    pictures.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(folder, workers, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
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
    if images[0].size[1] == processor:
        os.kill(os.getpid(), signal.SIGKILL)
    return process(images, 1.0, config)


@pytest.mark.parametrize("place", [0, 4])
def test_a_worker_that_dies_names_its_image_and_the_others_go_on(folder, caplog, place):
    asked = names(folder, 0, 1, 2, 3)
    asked.insert(place, str(folder / "4.png"))
    pictures = Pictures(MakePixels(deadly, 12, None, torch.float32), 2, ahead=8)
    pictures.expect(asked)
    found = [entry for start in (0, 2, 4) for entry in pictures.take(asked[start : start + 2])]
    pictures.close()
    assert [isinstance(entry, Unreadable) for entry in found] == [number == place for number in range(5)]
    assert f"{asked[place]}: cannot be read as an image (it kills the process" in str(found[place])
    assert "worker that reads images has died" in caplog.text


def test_a_worker_that_dies_does_not_disturb_the_model(folder):
    """PyTorch's handler would raise in the main thread, wherever that is; a loader before this one has set it."""
    list(DataLoader([0], num_workers=1, multiprocessing_context="fork"))
    assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN, None)
    asked = names(folder, 0, 1, 4, 2)
    pictures = Pictures(MakePixels(deadly, 12, None, torch.float32), 1, ahead=8)
    pictures.expect(asked)
    pictures.take(asked[:1])
    end = time.perf_counter() + 1.5
    while time.perf_counter() < end:  # the model, while the third image kills the worker
        sum(range(1000))
    found = pictures.take(asked[1:])
    pictures.close()
    assert [isinstance(entry, Unreadable) for entry in found] == [False, True, False]


def test_a_loader_that_cannot_start_means_no_workers(folder, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(module.Pictures, "_loader", refuse)
    pictures = Pictures(MAKE, 2, ahead=8)
    pictures.expect(names(folder, 0, 1, 2))
    assert [pixels.size[1] for pixels in pictures.take(names(folder, 0, 1, 2))] == [8, 9, 10]
    assert "without workers from here on ([Errno 24] Too many open files)" in caplog.text


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer"), RuntimeError("killed")])
def test_a_connection_that_breaks_off_is_a_worker_that_died(folder, monkeypatch, caplog, error):
    """A worker that is killed while it hands an image over: the image is read once more, the others after it."""
    original, broken = module._Ahead.next, [error]

    def next_(self):
        if broken:
            raise broken.pop()
        return original(self)

    monkeypatch.setattr(module._Ahead, "next", next_)
    pictures = Pictures(MAKE, 2, ahead=8)
    pictures.expect(names(folder, 0, 1, 2))
    assert [pixels.size[1] for pixels in pictures.take(names(folder, 0, 1, 2))] == [8, 9, 10]
    pictures.close()
    assert "worker that reads images has died" in caplog.text


def broken_process(images, processor, config):
    if images[0].size[1] == 9:
        raise ValueError("mean must have 1 elements")
    return process(images, 1.0, config)


def test_an_image_that_the_processor_refuses_is_named(folder):
    pictures = Pictures(MakePixels(broken_process, None, None, torch.float32), 1, ahead=8)
    pictures.expect(names(folder, 0, 1, 2))
    found = pictures.take(names(folder, 0, 1, 2))
    pictures.close()
    assert [isinstance(entry, Unreadable) for entry in found] == [False, True, False]
    assert "1.png: cannot be read as an image (mean must have 1 elements)" in str(found[1])


def slow(picture):
    time.sleep(0.05 if "0.png" in str(picture) else 20)
    return Image.open(picture).convert("RGB")


def test_the_end_does_not_wait_for_a_slow_image(folder):
    pictures = Pictures(MakePixels(process, 1.0, None, torch.float32, slow), 1, ahead=8)
    pictures.expect(names(folder, 0, 1, 2))
    pictures.take(names(folder, 0))
    started = time.perf_counter()
    pictures.close()
    assert time.perf_counter() - started < 12


def test_no_more_than_allowed_are_ahead(folder, tmp_path):
    def noted(picture):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / os.path.basename(picture)).touch()
        return Image.open(picture).convert("RGB")

    asked = names(folder, *range(12))
    pictures = Pictures(MakePixels(process, 1.0, None, torch.float32, noted), 1, ahead=6)
    pictures.expect(asked)
    pictures.take(asked[:1])
    time.sleep(1)
    assert 5 <= len(list((tmp_path / "made").iterdir())) <= 7  # six wait, and the one that was taken
    pictures.close()


def test_a_picture_that_comes_again_far_ahead_is_not_leapt_to(folder):
    """A batch that was halved may have dropped it."""
    asked = names(folder, *range(12), 0)
    pictures = Pictures(MAKE, 1, ahead=4)
    pictures.expect(asked)
    pictures.take(asked[:4])
    pictures.take(asked[4:8])
    (again,) = pictures.take(asked[:1])
    assert again.size == (10, 8) and pictures._next == 8
    assert [pixels.size[1] for pixels in pictures.take(asked[8:])] == [16, 17, 18, 19, 8]
    pictures.close()


def test_a_name_may_stand_for_another_picture_later(folder):
    pictures = Pictures(MAKE)
    (name,) = names(folder, 0)
    assert pictures.take([name])[0].size == (10, 8)
    os.replace(folder / "5.png", name)
    pictures.begin()
    assert pictures.take([name])[0].size == (10, 13)


def test_short_shared_memory_means_fewer_workers(folder, monkeypatch, caplog):
    size = 3 * 1024 * 1024 * 4  # bytes of a large picture's pixels
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(total=8 * size))
    for processes, fitting in ((1, 2), (2, 1), (8, 1)):
        pictures = Pictures(MAKE, 4, ahead=32, processes=processes)
        assert pictures._fitting(4) == fitting and pictures._fitting(1) == 1
        assert f"has room for {fitting} workers that read images, not 4" in caplog.text
        caplog.clear()
        pictures.expect(names(folder, *range(12)))
        assert all(isinstance(entry, Pixels) for entry in pictures.take(names(folder, *range(12))))
        pictures.close()


def test_waiting_is_counted(folder):
    pictures = Pictures(MakePixels(process, 1.0, None, torch.float32, slow))
    pictures.take(names(folder, 0, 10))
    assert 0.1 <= pictures.waited < 10
