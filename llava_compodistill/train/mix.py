"""Training data from several files (paper, Table 9): what a mix holds, and how often each sample is seen.

`--data_path` is one file of samples (a JSON list, or JSON Lines), several with commas between them, or a YAML file:

    datasets:
      - path: llava_v1_5_mix665k.json
      - path: sharegpt4v_100k.json
        weight: 0.5                     # half of its samples, drawn by the seed; 2 takes each of them twice
        image_folder: sharegpt4v        # below --image_folder
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..hosts.files import read_yaml
from .records import Records

MANIFEST_FILE = "data_manifest.json"
_FIELDS = ("path", "weight", "image_folder")


@dataclass(frozen=True)
class Source:
    """One file of a mix.

    Attributes:
        path: a JSON file of samples.
        weight: how often each of its samples is seen in an epoch; the share of them where it is below 1.
        image_folder: where its image names begin, below `--image_folder`.
    """

    path: str
    weight: float = 1.0
    image_folder: str = ""


def read_sources(data_path: str) -> list[Source]:
    """The files that `--data_path` names.

    Raises:
        DataError: naming the file, the entry and the field.
    """
    if data_path.endswith((".yaml", ".yml")):
        return _read_yaml(data_path)
    if os.path.exists(data_path):  # a name may hold a comma
        return [Source(data_path)]
    paths = [path.strip() for path in data_path.split(",")]
    if not all(paths):
        raise DataError(f"--data_path {data_path}: there is nothing between two of the commas.")
    return _different([Source(path) for path in paths], data_path)


def _read_yaml(path: str) -> list[Source]:
    content = read_yaml(path, option="--data_path ")
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"--data_path {path}: must hold a list `datasets`, each entry with a path.")
    folder = os.path.dirname(path)
    return _different([_source(entry, f"{path}, entry {n}", folder) for n, entry in enumerate(entries, 1)], path)


def _source(entry: Any, place: str, folder: str) -> Source:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise DataError(f"--data_path {place}: must be a path, or have one under `path`.")
    unknown = [str(name) for name in entry if name not in _FIELDS]
    if unknown:
        raise DataError(f"--data_path {place}: unknown {', '.join(unknown)}; there are {', '.join(_FIELDS)}.")
    weight = entry.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise DataError(f"--data_path {place}: weight must be a number above 0, got {weight!r}.")
    images = entry.get("image_folder") or ""
    if not isinstance(images, str):
        raise DataError(f"--data_path {place}: image_folder must be a text, got {images!r}.")
    return Source(os.path.join(folder, entry["path"]), float(weight), images)


def _different(sources: list[Source], place: str) -> list[Source]:
    names: list[str] = []
    for source in sources:
        try:
            names.append(os.path.realpath(source.path))
        except ValueError:  # a zero byte, half a character
            raise DataError(f"--data_path {place}: {source.path!r} is no name that a file can have.") from None
    for position, name in enumerate(names):
        if name in names[:position]:
            raise DataError(
                f"--data_path {place}: {sources[position].path} stands there twice; a weight of 2 does that."
            )
    return sources


#: Samples of one file in a mix: ten times as many as the largest known data sets hold.
_MOST = 100_000_000


class Mix(Sequence):
    """The samples of several files, each as often as its weight says, in the order of the files.

    Args:
        sources: the files.
        seed: draws the samples where a weight is no whole number.
        left_out: by path, what `Records` is given under that name.
        files: the records of each source, where they have been read already.
        Others as for `Records`.

    Attributes:
        words, with_image: as those of `Records`.

    Raises:
        DataError: as `Records` does, and where a weight leaves nothing of a file, or makes too much of it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_folder: str,
        bad_samples: str,
        check_images: bool,
        seed: int,
        paired: bool = False,
        allow_outside: bool = False,
        left_out: Mapping[str, Mapping[int, int]] | None = None,
        files: Sequence[Records] | None = None,
    ):
        self.sources, self.seed = list(sources), seed
        self._files = list(files or ())
        for source in () if files else sources:
            folder = os.path.join(image_folder, source.image_folder)
            options = bad_samples, check_images, paired, allow_outside, (left_out or {}).get(source.path)
            self._files.append(Records(source.path, folder, *options))
        self._file, self._place = array("q"), array("q")
        self.words, self.with_image = array("q"), array("b")
        self._used: list[int] = []
        self._digests: list[str] = []
        for number, (source, records) in enumerate(zip(self.sources, self._files, strict=True)):
            if source.weight * len(records) > _MOST:
                raise DataError(
                    f"--data_path: a weight of {source.weight:g} makes more than {_MOST:,} samples of the "
                    f"{len(records):,} in {source.path}. (1 takes each once; --num_train_epochs repeats the whole.)"
                )
            places = _drawn(len(records), source.weight, seed + number)
            if not places:
                raise DataError(f"--data_path: a weight of {source.weight:g} leaves no sample of {source.path}.")
            self._used.append(len(places))
            self._file.extend([number] * len(places))
            self._place.extend(places)
            self.words.extend(records.words[place] for place in places)
            self.with_image.extend(records.with_image[place] for place in places)

    def __len__(self) -> int:
        return len(self._place)

    def origin(self, index: int) -> tuple[int, int]:
        """The number of a sample's file, and its place among the file's usable samples."""
        return self._file[index], self._place[index]

    def file_of(self, index: int) -> str:
        """The file that a sample is from."""
        return self.sources[self._file[index]].path

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample; its image's name begins at `--image_folder`."""
        number = self._file[index]
        record = self._files[number][self._place[index]]
        if "image" in record:
            record["image"] = os.path.join(self.sources[number].image_folder, record["image"])
        return record

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint keeps of its data. The first call reads the files once more, for their SHA-256."""
        if not self._digests:
            self._digests = [_sha256(source.path) for source in self.sources]
        files = [
            {
                "path": os.path.realpath(source.path),
                "sha256": digest,
                "bytes": os.path.getsize(source.path),
                "samples": len(records),
                "with_image": sum(records.with_image),
                "weight": source.weight,
                "used": used,
                "image_folder": source.image_folder,
            }
            for source, records, used, digest in zip(self.sources, self._files, self._used, self._digests, strict=True)
        ]
        return {"samples": len(self), "with_image": sum(self.with_image), "seed": self.seed, "files": files}


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Leave the manifest beside the weights."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (Path(folder) / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _drawn(count: int, weight: float, seed: int) -> list[int]:
    """Which of a file's samples are used, in order: each `floor(weight)` times, and a share of them once more."""
    times, rest = divmod(weight, 1)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: round(rest * count)]
    return sorted([*range(count)] * int(times) + drawn.tolist())


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
