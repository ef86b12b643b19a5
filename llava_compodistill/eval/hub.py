"""Benchmarks as they lie on the Hugging Face hub, written as the local files that `load` reads: from the hub itself
(`eval --hub`), or from what somebody has downloaded of it (parquet files, or a data set's own)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingData

if TYPE_CHECKING:
    from .benchmarks.base import EngineBenchmark


@dataclass(frozen=True)
class Hub:
    """Where rows and files of the hub's data sets come from.

    Attributes:
        folder: of the benchmark. A download of a data set lies in it, in a folder called like the data set, which may
            also be beside it.
        online: whether the hub may be asked.
        how_to_get: for messages.
        progress: called with a line on what is fetched or unpacked.
    """

    folder: Path
    online: bool
    how_to_get: str
    progress: Callable[[str], None] = lambda text: None

    def rows(self, repository: str, alone: bool = True) -> Iterable[dict[str, Any]]:
        """The rows of a data set's test split.

        Args:
            alone: whether the benchmark is this one data set, so that its folder itself may be the download.

        Raises:
            MissingData: when it has not been downloaded, and the hub is not to be asked.
            DataError: when the `datasets` package is missing, or the hub refuses.
        """
        places = self._places(repository)[: None if alone else -1]
        parquet = next((found for place in places if (found := _parquet(place))), [])
        if not parquet and not self.online:
            raise MissingData(f"there is no download of {repository}: {self.how_to_get}")
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{repository}: reading it needs the datasets package: pip install 'llava-compodistill[eval]'."
            ) from None
        self.progress(f"{repository}, from {parquet[0].parent if parquet else 'the hub'}")
        try:
            if parquet:
                return datasets.load_dataset("parquet", data_files={"test": list(map(str, parquet))}, split="test")
            return datasets.load_dataset(repository, split="test")
        except Exception as error:  # of many kinds: no network, no such repository, a gate
            raise self._refused(repository, error) from error

    def file(self, repository: str, name: str) -> Path:
        """One file of a data set.

        Raises:
            MissingData, DataError: as `rows`.
        """
        for place in self._places(repository):
            for path in (place / name, place / Path(name).name):
                if path.is_file():
                    return path
        if not self.online:
            raise MissingData(f"there is no download of {repository}: {self.how_to_get}")
        try:
            import huggingface_hub
        except ImportError:
            raise DataError(f"{repository}: --hub needs the huggingface_hub package.") from None
        self.progress(f"{repository}/{name}, from the hub")
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))
        except Exception as error:
            raise self._refused(repository, error) from error

    def _places(self, repository: str) -> list[Path]:
        name = repository.split("/")[-1]
        return [self.folder / name, self.folder.parent / name, self.folder]

    def _refused(self, repository: str, error: Exception) -> DataError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DataError(f"{repository}: {reason} ({self.how_to_get})")


def _parquet(folder: Path) -> list[Path]:
    """The parquet files of a data set's test split."""
    files = [path for place in (folder, folder / "data") for path in sorted(place.glob("*.parquet"))]
    return [path for path in files if path.name.startswith("test")] or files


def fetch(
    benchmark: EngineBenchmark, data: Path, progress: Callable[[str], None] = lambda text: None, online: bool = True
) -> None:
    """Write a benchmark's files into its folder, from a download that lies there or from the hub; files that are there
    already are left alone.

    Args:
        online: whether the hub may be asked; without, a benchmark that nobody has downloaded is left as it is.

    Raises:
        DataError: when it is not on the hub, a package is missing, or the hub refuses.
    """
    from .benchmarks.files import home

    if benchmark.hub is None:
        if online:
            raise DataError(f"--hub: {benchmark.name} is not on the hub: {benchmark.how_to_get}")
        return
    folder = home(data, benchmark.name)
    try:
        benchmark.hub(folder, Hub(folder, online, benchmark.how_to_get, progress))
    except MissingData:
        if online:
            raise
    except KeyError as error:
        raise DataError(f"{benchmark.name}: the data set has no column {error}: {benchmark.how_to_get}") from None


def unpack(path: Path, folder: Path) -> None:
    """The files of a zip, without its folders, into a folder that is whole or not there.

    Raises:
        DataError: for a file that is no zip.
    """
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = Path(entry.filename).name
                if not entry.is_dir() and not name.startswith(".") and "__MACOSX" not in entry.filename:
                    (part / name).write_bytes(archive.read(entry))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:  # RuntimeError: a password
        raise DataError(f"{path}: cannot be unpacked ({error}).") from None
    part.replace(folder)


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
