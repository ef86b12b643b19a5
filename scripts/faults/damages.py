"""What can be wrong with a file on the disk."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"")


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def zero_tail(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    kept = rng.randrange(len(data)) if data else 0
    path.write_bytes(data[:kept] + bytes(len(data) - kept))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def flip(path: Path, rng: random.Random, end: int | None = None) -> None:
    """Change one bit; with `end` one of the first or last so many bytes."""
    data = bytearray(path.read_bytes())
    if data:
        places = range(len(data)) if end is None else [*range(min(end, len(data))), *range(len(data))[-end:]]
        data[rng.choice(places)] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def make_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": cut,
    "emptied": empty,
    "tail of zeros": zero_tail,
    "removed": remove,
    "one bit": flip,
    "a folder": make_folder,
}
#: Of files that may be pickles.
PICKLES = (".bin", ".pt", ".pth", ".pkl")


class Payload:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def payload(marker: Path, rng: random.Random) -> bytes:
    """A pickle that runs something: bare, or in the archive that torch.save writes."""
    made = pickle.dumps({"state": {}, "param_groups": [], "weight": Payload(marker)}, protocol=2)
    if rng.random() < 0.3:
        return made
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in (("data.pkl", made), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return target.getvalue()


def apply(path: Path, marker: Path, rng: random.Random, end: int | None = None) -> str:
    """Damage a file; returns how. A file that may be a pickle becomes, as likely, one that runs code.

    Args:
        end: change a bit in the first or last so many bytes alone.
    """
    names = [*DAMAGES] + ["a payload"] * (path.suffix in PICKLES)
    name = rng.choice(names)
    if name == "a payload":
        path.write_bytes(payload(marker, rng))
    elif name == "one bit":
        flip(path, rng, end)
    else:
        DAMAGES[name](path, rng)
    return name
