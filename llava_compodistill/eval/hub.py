"""Benchmarks from the Hugging Face hub, written as the local files that they read: `eval --hub`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from .benchmarks.base import EngineBenchmark


def fetch(benchmark: EngineBenchmark, data: Path, progress: Callable[[str], None] = lambda text: None) -> None:
    """Download a benchmark into DATA/NAME; files that are there already are left alone.

    Raises:
        DataError: when it is not on the hub, the `datasets` package is missing, or the hub refuses.
    """
    if benchmark.hub is None:
        raise DataError(f"--hub: {benchmark.name} is not on the hub: {benchmark.how_to_get}")

    def load_rows(repository: str) -> Iterable[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise DataError("--hub needs the datasets package: pip install 'llava-compodistill[eval]'.") from None
        progress(f"{repository}, from the hub")
        try:
            return datasets.load_dataset(repository, split="test")
        except Exception as error:  # of many kinds: no network, no such repository, a gate
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{repository}: {reason} ({benchmark.how_to_get})") from error

    benchmark.hub(data / benchmark.name, load_rows)


def save_image(image: Any, path: Path) -> str:
    """Save a PIL image in RGB, whole or not at all, unless the file is there; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        part = path.with_suffix(".part.png")
        image.convert("RGB").save(part)
        part.replace(path)
    return path.name


def write_whole(path: Path, text: str) -> None:
    """Write the file that says a benchmark is complete: last, and whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
