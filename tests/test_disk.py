"""What a disk refuses is said in one sentence, whoever was writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llava_compodistill.errors import CompoDistillError, DiskError
from llava_compodistill.hosts import disk


def python(path):
    path.write_text("a" * 100_000)


def archive(path):
    torch.save({"a": torch.zeros(100_000)}, path)


@pytest.mark.parametrize("write", [python, archive])
def test_a_full_disk_is_named(write):
    """/dev/full is a file on a disk without room."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(DiskError, match=r"/dev cannot be written: .*GiB are free.*run the same command again"):
        with disk.explained("/dev"):
            write(Path("/dev/full"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_the_file_and_the_reason_are_named(tmp_path, code):
    with pytest.raises(DiskError, match=rf"out/a cannot be written: {os.strerror(code)} \(") as caught:
        with disk.explained(str(tmp_path)):
            raise OSError(code, os.strerror(code), "out/a")
    assert isinstance(caught.value, CompoDistillError)


@pytest.mark.parametrize("kind", [SafetensorError, Exception])  # of safetensors, of tokenizers
def test_some_say_it_in_their_text_alone(tmp_path, kind):
    with pytest.raises(DiskError, match="cannot be written: No space left on device"):
        with disk.explained(str(tmp_path)):
            raise kind("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "said", ["[enforce fail at inline_container.cc:664] . unexpected pos", "basic_ios::clear: iostream error"]
)
def test_pytorch_does_not_say_why(tmp_path, said):
    with pytest.raises(DiskError, match="cannot be written: PyTorch could write a part of it only"):
        with disk.explained(str(tmp_path)):
            raise RuntimeError(said)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no", "a"), RuntimeError("CUDA out of memory"), ValueError("a")]
)
def test_all_else_passes(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk.explained(str(tmp_path)):
        raise error
    assert caught.value is error
