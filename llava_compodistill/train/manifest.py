"""What a checkpoint has to hold, file by file: written last, so that a folder with it was saved to the end.

`seal` puts all of a folder on the disk, and then writes `checkpoint_manifest.json`: every file's size and the SHA-256
of its first and last 64 KiB, which costs the same for any size. It finds what kills, full disks and power cuts do:
missing, short, empty and zeroed files. A changed bit in the middle of a file it does not find; `--verify_checkpoints
True` hashes whole files, when they are saved and when they are resumed from. (That reads every checkpoint once more,
twenty times a run, which is why it is a flag.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST_FILE = "checkpoint_manifest.json"
#: Bytes at either end of a file that are hashed.
END = 1 << 16
_AT_ONCE = 1 << 22


def flush(folder: str | os.PathLike, subfolders: bool = True) -> None:
    """Wait until the files of a folder are on the disk, under their names.

    Args:
        subfolders: theirs, too.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob("*") if subfolders else folder.glob("*"))
    for path in paths:
        if path.is_file():
            sync(path)
    for path in reversed(paths):
        if subfolders and path.is_dir():
            sync(path)
    sync(folder)
    sync(folder.absolute().parent)


def seal(folder: str | os.PathLike, whole: bool = False) -> None:
    """Put a finished checkpoint on the disk and write its manifest, in this order.

    Args:
        whole: hash whole files, not their ends alone.
    """
    folder = Path(folder)
    target, temporary = folder / MANIFEST_FILE, folder / f"{MANIFEST_FILE}.tmp"
    target.unlink(missing_ok=True)
    flush(folder)
    files = {}
    for path in _files(folder):
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {
            "bytes": size,
            "ends_sha256": hash_of_ends(path),
            **({"sha256": _hash(path)} if whole else {}),
        }
    text = json.dumps({"format": 1, "end_bytes": END, "files": files}, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, target)
    sync(folder)


def is_sealed(folder: str | os.PathLike) -> bool:
    """Whether a folder has a manifest. (Earlier releases wrote none.)"""
    return (Path(folder) / MANIFEST_FILE).exists()


def find_damage(folder: str | os.PathLike, whole: bool = False) -> str | None:
    """What differs from the manifest, naming the file; None where nothing does.

    Args:
        whole: compare the hashes of whole files, where the manifest has them.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["ends_sha256"], entry.get("sha256")) for name, entry in files.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} is damaged ({type(error).__name__}: {error})"
    for name, (size, ends, entire) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} is damaged ({found} bytes of {size})"
            if hash_of_ends(path) != ends:
                return f"{name} is damaged (its first or last {END // 1024} KiB are not what was saved)"
            if whole and entire is not None and _hash(path) != entire:
                return f"{name} is damaged (its SHA-256 is not what was saved)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def has_whole_hashes(folder: str | os.PathLike) -> bool:
    """Whether the checkpoint was saved with `--verify_checkpoints True`. Its manifest has to be sound."""
    files = json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    return all("sha256" in entry for entry in files.values())


def names_in(folder: str | os.PathLike) -> set[str]:
    """The files that a sound manifest names."""
    content: dict[str, Any] = json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))
    return set(content["files"])


def _files(folder: Path) -> Iterator[Path]:
    own = {MANIFEST_FILE, f"{MANIFEST_FILE}.tmp"}
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in own)


def hash_of_ends(path: Path) -> str:
    """The SHA-256 of the first and last 64 KiB of a file."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(END))
        if size > END:
            file.seek(max(END, size - END))
            digest.update(file.read(END))
    return digest.hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot do this, for folders above all; an error of the disk is another one.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)
