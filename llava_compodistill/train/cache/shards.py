"""A folder of shards: what one is like, and whether it is whole.

    cache.json              settings, written first: what a command that goes on, or trains, has to agree with
    00000000-00000512.safetensors   positions 0 to 511 of the data; one process writes a shard
    index.json              size and hash of every shard, written last: without it the cache is not finished

A shard holds named parts. Each sample has its own number of entries in each: a part NAME is one flat tensor with the
samples one after the other, and NAME.lengths says how many entries each has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...errors import CacheError
from ...hosts.files import read_object
from .. import manifest

#: Raised where what settings.py compares changes: 2 looks into every tensor of a teacher, and at its config.
FORMAT = 2
SETTINGS_FILE = "cache.json"
INDEX_FILE = "index.json"
_LENGTHS = ".lengths"
_TYPES = {"U8": np.uint8, "U16": np.uint16, "F32": np.float32, "I64": np.int64}

#: What a cache has of one sample: arrays of one dimension by name.
Entry = Mapping[str, np.ndarray]


def shard_name(start: int, stop: int) -> str:
    """The file of the positions from `start` to before `stop`."""
    return f"{start:08d}-{stop:08d}.safetensors"


def write_shard(folder: Path, start: int, entries: Sequence[Entry]) -> Path:
    """Write the entries of the positions from `start` on, all or nothing: under another name, to the disk, renamed.

    Raises:
        OSError, SafetensorError: as the disk says; what was begun is removed.
    """
    path = folder / shard_name(start, start + len(entries))
    tensors: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        parts = [entry[name] for entry in entries if name in entry]
        tensors[name] = np.concatenate(parts)
        lengths = [len(entry[name]) if name in entry else 0 for entry in entries]
        tensors[name + _LENGTHS] = np.array(lengths, np.int64)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        try:
            _write_and_rename(tensors, temporary, path)
        except FileNotFoundError:
            # The first rank has ended, and with it the lock; a command that began then took this file for a leftover.
            _write_and_rename(tensors, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_and_rename(tensors: dict[str, np.ndarray], temporary: Path, path: Path) -> None:
    save_file(tensors, temporary)
    manifest.sync(temporary)
    os.replace(temporary, path)
    manifest.sync(path.parent)


class Shard:
    """A shard that is read; its file is mapped into memory, and no more of it is read than is asked for.

    Args:
        parts: those that `read` gives, of those that there are; all by default.

    Raises:
        CacheError: for a file that cannot be read, or is damaged.
    """

    def __init__(self, path: Path, parts: Iterable[str] | None = None):
        try:
            self._file = safe_open(path, framework="np")  # compares the header with the file's size
            names = set(self._file.keys())
            self._starts: dict[str, np.ndarray] = {}
            for name in names if parts is None else names.intersection(parts):
                if name + _LENGTHS in names:
                    lengths = self._file.get_tensor(name + _LENGTHS)
                    self._starts[name] = np.concatenate([[0], lengths.cumsum()])
            counts = {len(starts) - 1 for starts in self._starts.values()}
            if len(counts) != 1:
                raise ValueError("its parts are not of one number of samples")
        except OSError as error:
            raise CacheError(f"{path} cannot be read ({error}).") from None
        except (ValueError, SafetensorError) as error:
            raise CacheError(f"{path} is damaged ({error}). {REPAIR}") from None
        self.samples = counts.pop()

    def read(self, place: int) -> dict[str, np.ndarray]:
        """The entry of a sample, by its number in the shard."""
        return {name: self._part(name, starts[place], starts[place + 1]) for name, starts in self._starts.items()}

    def left_out(self) -> list[int]:
        """The samples that could not be read when it was made, by their numbers in the shard."""
        return (self._file.get_tensor("sizes").reshape(self.samples, -1)[:, 0] < 0).nonzero()[0].tolist()

    def _part(self, name: str, start: int, stop: int) -> np.ndarray:
        part = self._file.get_slice(name)
        if start == stop:  # safetensors takes an empty slice at the end for one beyond it
            return np.zeros(0, _TYPES[part.get_dtype()])
        return part[int(start) : int(stop)]


REPAIR = "Run the same `llava-compodistill cache` command again: it makes what is damaged anew and keeps the rest."


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Leave what the cache is made of."""
    _write_json(folder / SETTINGS_FILE, {"format": FORMAT, "settings": settings})


def read_settings(folder: Path) -> dict[str, Any]:
    """What a cache is made of.

    Raises:
        CacheError: for a folder that is no cache, or one of another release.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        what = "holds no teacher cache" if folder.is_dir() else "is not a folder"
        raise CacheError(f"{folder} {what} (no {SETTINGS_FILE}). `llava-compodistill cache` makes one.")
    content = read_object(path, CacheError)
    if content.get("format") != FORMAT or not isinstance(content.get("settings"), dict):
        raise CacheError(
            f"{path}: format {content.get('format')!r}, and this release reads {FORMAT}. Make the cache anew in "
            "another folder."
        )
    return content["settings"]


def write_index(folder: Path, blocks: Sequence[tuple[int, int]]) -> int:
    """Finish a cache whose shards are all there; returns its bytes."""
    files = {}
    for start, stop in blocks:
        path = folder / shard_name(start, stop)
        size = path.stat().st_size
        files[path.name] = {"start": start, "stop": stop, "bytes": size, "ends_sha256": manifest.hash_of_ends(path)}
    _write_json(folder / INDEX_FILE, {"format": FORMAT, "shards": files})
    return sum(entry["bytes"] for entry in files.values())


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The shards of a finished cache by name: start, stop, bytes, ends_sha256.

    Raises:
        CacheError: when it is not finished, or the file is damaged.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CacheError(f"{folder} is not finished (no {INDEX_FILE}). {GO_ON}")
    shards = read_object(path, CacheError).get("shards")
    names = {"start": int, "stop": int, "bytes": int, "ends_sha256": str}
    sound = isinstance(shards, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in names.items())
        for entry in shards.values()
    )
    if not sound:
        raise CacheError(f"{path} is damaged: it must name the shards. {GO_ON}")
    return shards


GO_ON = "Run the same `llava-compodistill cache` command again: it goes on where it was stopped."


def damage(path: Path, expected: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a shard; None where nothing is.

    Args:
        expected: its entry of the index; None where the cache is not finished, and the file's own header has to do.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if expected is not None and size != expected["bytes"]:
        return f"is damaged ({size} bytes of {expected['bytes']})"
    if expected is not None and manifest.hash_of_ends(path) != expected["ends_sha256"]:
        return f"is damaged (its first or last {manifest.END // 1024} KiB are not what was written)"
    if expected is None:
        try:
            Shard(path)
        except CacheError as error:
            return str(error).removeprefix(f"{path} ")
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    manifest.sync(temporary)
    os.replace(temporary, path)
    manifest.sync(path.parent)
