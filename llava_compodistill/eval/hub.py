"""Benchmarks from the Hugging Face hub, written as the local files that `formats` reads: `eval --hub`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import DataError
from .formats import HOW_TO_GET
from .scorers import SUGARCREPE


def fetch(name: str, data: Path, progress: Callable[[str], None] = lambda text: None) -> None:
    """Download a benchmark into DATA/NAME; files that are there already are left alone.

    Raises:
        DataError: when it is not on the hub, the `datasets` package is missing, or the hub refuses.
    """
    if name not in _WRITERS:
        raise DataError(f"--hub: {name} is not on the hub: {HOW_TO_GET[name]}")

    def load(repository: str) -> Iterable[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise DataError("--hub needs the datasets package: pip install 'llava-compodistill[eval]'.") from None
        progress(f"{repository}, from the hub")
        try:
            return datasets.load_dataset(repository, split="test")
        except Exception as error:  # of many kinds: no network, no such repository, a gate
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{repository}: {reason} ({HOW_TO_GET[name]})") from error

    _WRITERS[name](data / name, load)


Load = Callable[[str], Iterable[dict[str, Any]]]


def _sugarcrepe(folder: Path, load: Load) -> None:
    for subset in SUGARCREPE:
        path = folder / f"{subset}.json"
        if path.is_file():
            continue
        items = {}
        for number, row in enumerate(load(f"HuggingFaceM4/SugarCrepe_{subset}")):
            true, false = row["tested_labels"][:2]
            file = _save(row["image"], folder / "images" / f"{subset}_{number:05d}.png")
            items[str(number)] = {"filename": file, "caption": true, "negative_caption": false}
        _write(path, json.dumps(items, indent=1))


def _bivlc(folder: Path, load: Load) -> None:
    if (folder / "bivlc.jsonl").is_file():
        return
    entries = []
    for number, row in enumerate(load("imirandam/BiVLC")):
        entry = {name: row[name] for name in ("caption", "negative_caption", "type", "subtype") if name in row}
        for name in ("image", "negative_image"):
            entry[name] = _save(row[name], folder / "images" / f"{number:05d}_{name}.png")
        entries.append(entry)
    _write(folder / "bivlc.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def _winoground(folder: Path, load: Load) -> None:
    if (folder / "examples.jsonl").is_file():
        return
    entries = []
    for row in load("facebook/winoground"):
        entry = {name: row[name] for name in ("id", "caption_0", "caption_1", "tag", "collapsed_tag") if name in row}
        for name in ("image_0", "image_1"):
            entry[name] = _save(row[name], folder / "images" / f"ex_{row['id']}_{name}.png")
        entries.append(entry)
    _write(folder / "examples.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


_WRITERS: dict[str, Callable[[Path, Load], None]] = {
    "sugarcrepe": _sugarcrepe,
    "bivlc": _bivlc,
    "winoground": _winoground,
}
ON_HUB = tuple(_WRITERS)


def _save(image: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        part = path.with_suffix(".part.png")
        image.convert("RGB").save(part)
        part.replace(path)
    return path.name


def _write(path: Path, text: str) -> None:
    """The file that says a benchmark is complete: written last, and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
