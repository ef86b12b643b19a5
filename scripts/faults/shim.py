"""Builds shim.c, and speaks to it from the processes that it is loaded into."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("shim.c")
#: Of operations, in the order of shim.c's enum.
KINDS = ("open", "write", "rename", "unlink", "mkdir", "rmdir", "truncate", "fsync", "link", "close")
PLACES = ("before", "inside", "after")
_VARIABLE = "LD_PRELOAD"


class NoCompiler(Exception):
    """The shim cannot be built on this machine."""


def build(folder: Path) -> Path:
    """Compile the shim; returns the library.

    Raises:
        NoCompiler: naming what is missing, or with the compiler's message.
    """
    compiler = os.environ.get("CC") or "cc"
    if shutil.which(compiler) is None:
        raise NoCompiler(f"There is no C compiler {compiler!r} here (CC names another one): kills need it.")
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


def environment(library: Path) -> dict[str, str]:
    """Of a process that the shim is to be in."""
    return {**os.environ, _VARIABLE: str(library)}


def loaded() -> Path | None:
    """The shim in this process."""
    name = os.environ.get(_VARIABLE, "")
    return Path(name) if name.endswith("shim.so") else None


@dataclass(frozen=True)
class Operation:
    """Something that changed a file: one line of a trace.

    Attributes:
        kind: one of `KINDS`.
        size: bytes written.
        inode: of the file, 0 where there was none yet.
        path, other: the file, and a rename's new name.
    """

    kind: str
    size: int
    inode: int
    path: str
    other: str = ""


class Shim:
    """The shim of this process; children inherit what is set."""

    def __init__(self) -> None:
        library = loaded()
        if library is None:
            raise NoCompiler("The shim is not in this process: start it with environment(library).")
        self._calls = ctypes.CDLL(str(library))
        self._calls.faults_kill.argtypes = [ctypes.c_long, ctypes.c_int]
        self._calls.faults_fail.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int]
        self._calls.faults_failed.restype = ctypes.c_long

    def watch(self, folder: Path, trace: Path | None = None) -> None:
        """Count the operations below a folder from now on, and write them down."""
        if trace is not None:
            self._calls.faults_trace(os.open(trace, os.O_CREAT | os.O_WRONLY | os.O_APPEND))
        self._calls.faults_watch(os.fsencode(folder.resolve()))

    def kill_at(self, operation: int, place: str) -> None:
        """SIGKILL before, inside (half of what is written goes out) or after the n-th operation, from 1."""
        self._calls.faults_kill(operation, PLACES.index(place))

    def fail_from(self, operation: int, room: int, code: int) -> None:
        """Fail with an errno from the n-th operation on, when `room` more bytes have been written."""
        self._calls.faults_fail(operation, room, code)

    def off(self) -> int:
        """Stop; returns how many operations were let fail."""
        self._calls.faults_off()
        return self._calls.faults_failed()


def read_trace(path: Path) -> list[Operation]:
    """The operations of a run, in order."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        kind, size, inode, name, other = line.split("\t")
        found.append(Operation(KINDS[int(kind)], int(size), int(inode), name, other))
    return found


def lose_unsynced(operations: Iterable[Operation], folder: Path) -> list[str]:
    """What a power cut takes: the bytes of every file that were written after its last fsync become zeros.

    Names and sizes are taken to be on the disk already, as journalling file systems write them first.

    Returns:
        The names below the folder that were changed.
    """
    written: dict[int, int] = {}
    safe: dict[int, int] = {}
    for one in operations:
        if one.kind == "write":
            written[one.inode] = written.get(one.inode, 0) + one.size
        elif one.kind == "fsync":
            safe[one.inode] = written.get(one.inode, 0)
        elif one.kind == "unlink":  # the number may be given to another file
            written.pop(one.inode, None)
            safe.pop(one.inode, None)
    changed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        status = path.stat()
        if safe.get(status.st_ino, 0) < written.get(status.st_ino, 0) and status.st_size:
            with path.open("r+b") as file:
                file.truncate(min(safe.get(status.st_ino, 0), status.st_size))
                file.truncate(status.st_size)
            changed.append(str(path.relative_to(folder)))
    return changed
