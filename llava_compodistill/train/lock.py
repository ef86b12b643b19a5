"""One run at a time in an output folder, which is proved to be writable before anything is loaded.

The lock is the operating system's (flock) on OUTPUT/.lock: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from .manifest import MANIFEST_FILE

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
#: What a kill leaves of a save: the folder that transformers 4.37 renames at its end, and files that are renamed.
_UNFINISHED_FOLDER = re.compile(r"tmp-checkpoint-\d+")
_UNFINISHED_FILE = re.compile(rf"{re.escape(MANIFEST_FILE)}\.tmp|\.tmp[A-Za-z0-9]{{6}}")  # ours; those of safetensors


@contextlib.contextmanager
def locked(output_dir: str, flag: str = "--output_dir", lost: str = "checkpoints") -> Iterator[None]:
    """Hold an output folder, making it where it is missing; one that stays empty is removed again.

    Args:
        flag: that names the folder.
        lost: what a folder that cannot be written to would lose.

    Raises:
        OutputError: when it cannot be written to, or another run holds it; naming that run's process and host.
    """
    folder = Path(output_dir)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder / LOCK_FILE, flag)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{flag} {output_dir} cannot be written to ({error.strerror or error}): {lost} would be lost. "
            "Make it writable, free some space, or name another folder."
        ) from None
    # A worker that loads data would keep the lock of a run that was killed.
    held = [handle]
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:1]])
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        held.clear()
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # of a run that was refused before it wrote anything


def _take(path: Path, flag: str) -> int:
    """A descriptor that holds the lock on a file with this process' name in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path, flag)
            if _is_at(handle, path):
                _write(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the run that held it has removed the file since


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(handle: int, path: Path, flag: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise OutputError(
                f"{flag} {path.parent}: another run is writing to it ({_holder(handle)}). Wait for its end, "
                "stop it, or name another folder."
            ) from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        logger.warning(
            "The file system of %s has no locks (%s): see to it that no other run writes to this folder.",
            path.parent,
            error.strerror,
        )


def _write(handle: int) -> None:
    """Who holds the lock; also the proof that the disk takes what is written."""
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n", 0)
    os.fsync(handle)


def _holder(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(found['pid'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"


def remove_unfinished(output_dir: str) -> None:
    """Remove what killed runs have left of saves that did not come to their end, and name it. Hold the lock."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("tmp-checkpoint-*") if _UNFINISHED_FOLDER.fullmatch(path.name)]
    for place in (folder, *folder.glob("checkpoint-*")):
        if place.is_dir():
            found += [path for path in place.iterdir() if path.is_file() and _UNFINISHED_FILE.fullmatch(path.name)]
    for path in sorted(found):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        logger.warning("Removed %s, which a run that was killed while saving has left.", path)
