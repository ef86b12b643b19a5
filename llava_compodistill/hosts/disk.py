"""A disk that is full, broken or read-only ends a run with a sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator

from ..errors import CompoDistillError, DiskError

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def explained(output_dir: str, then: str = "it goes on from the newest whole checkpoint") -> Iterator[None]:
    """In here what the disk refuses becomes one kind of error, whoever was writing.

    Args:
        then: what the same command does when it is run again.

    Raises:
        DiskError: naming the file, where that is known, the reason and the space that is free.
    """
    try:
        yield
    except CompoDistillError:
        raise
    except Exception as error:  # tokenizers raises no narrower kind
        reason = _reason(error)
        if reason is None:
            raise
        raise DiskError(
            f"{_file(error) or output_dir} cannot be written: {reason} ({_free(output_dir)}). When it can be, run the "
            f"same command again: {then}."
        ) from error


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _CODES else None
    told = re.search(
        r"\(os error (\d+)\)", str(error)
    )  # safetensors and tokenizers keep the number in their text alone
    if told and int(told[1]) in _CODES:
        return os.strerror(int(told[1]))
    # PyTorch's writer forgets the number; the stream below it, the file as well.
    lost = any(words in str(error) for words in ("inline_container.cc", "iostream error"))
    return "PyTorch could write a part of it only" if lost else None


def _file(error: BaseException) -> str | None:
    name = getattr(error, "filename", None)
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else None


def _free(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free"
    except OSError as error:
        return str(error.strerror)
