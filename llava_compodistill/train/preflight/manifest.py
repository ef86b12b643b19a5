"""The files of --data_path, read as training reads them, with every bad sample by name."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import DataError
from ..mix import Mix, Source
from ..records import Records
from .findings import NOTE, SKIPS, STOPS, Example, Findings

_STEP = 2_000


class InspectedRecords(Records):
    """A file's records. What is wrong with the others goes into `findings`.

    Args:
        source: the file, with the folder of its images below `image_folder`.
        keep_paths: whether to keep the names of the images.
        done: told how many bytes of the file have been read since the last time.
        Others as for `Records`.

    Attributes:
        numbers: place in the file of each usable sample.
        images: the image's path of each usable sample, "" for none; empty without `keep_paths`.
    """

    def __init__(
        self,
        source: Source,
        image_folder: str,
        check_images: bool,
        paired: bool,
        allow_outside: bool,
        left_out: Mapping[int, int] | None,
        findings: Findings,
        keep_paths: bool,
        done: Callable[[int], None],
    ):
        self.numbers, self.images = array("q"), []
        self._source, self._findings = source, findings
        self._keep_paths, self._done, self._read = keep_paths, done, 0
        folder = os.path.join(image_folder, source.image_folder)
        super().__init__(source.path, folder, "skip", check_images, paired, allow_outside, left_out)

    def _problem(self, record: Any, index: int, place: int, checksum: int) -> str | None:
        if index % _STEP == 0:
            self._done(place - self._read)
            self._read = place
        problem = super()._problem(record, index, place, checksum)
        name = record.get("id", index) if isinstance(record, dict) else index
        example = Example("", self._source.path, index, name)
        if problem is not None:
            self._findings.add(SKIPS, problem, example)
            self._findings.leave_out(self._source.path, index, checksum, name, problem)
            return problem
        self.numbers.append(index)
        self._look(record, example)
        return None

    def _report(self, problems: list, count: int, bad_samples: str) -> None:
        """They are in the findings."""

    def _look(self, record: dict[str, Any], example: Example) -> None:
        if any(turn["from"] == "gpt" and not turn["value"].strip() for turn in record["conversations"]):
            self._findings.add(
                NOTE, "an empty answer", example, "the model learns to say nothing there: fill it in if not meant"
            )
        image = record.get("image")
        if self._keep_paths:
            self.images.append("" if image is None else os.path.join(self._image_folder or "", image))

    def example(self, place: int, detail: str = "") -> Example:
        """A usable sample by its place among them."""
        return Example(detail, self._path, self.numbers[place], self[place].get("id", self.numbers[place]))

    def leave_out(self, place: int, why: str, refused: bool = True) -> None:
        """Remember a usable sample that turned out not to be one.

        Args:
            refused: whether training cannot read it, either.
        """
        found = self.example(place)
        self._findings.leave_out(self._path, found.index, self.checksums[place], found.id, why, refused)


def read_manifest(
    sources: list[Source],
    image_folder: str,
    check_images: bool,
    paired: bool,
    allow_outside: bool,
    seed: int,
    left_out: Mapping[str, Mapping[int, int]],
    findings: Findings,
    keep_paths: bool = False,
    done: Callable[[int], None] = lambda read: None,
) -> tuple[Mix | None, list[InspectedRecords]]:
    """The mix that training would see; None where it would see none.

    Args:
        As for `Mix` and `InspectedRecords`.
    """
    files: list[InspectedRecords] = []
    for source in sources:
        try:
            unwanted = left_out.get(source.path)
            options = check_images, paired, allow_outside, unwanted, findings, keep_paths, done
            files.append(InspectedRecords(source, image_folder, *options))
        except (DataError, OSError) as error:
            findings.add(STOPS, f"a data file that cannot be used: {error}", Example(file=source.path))
    if len(files) < len(sources):
        return None, files
    with findings.stopping("the mix"):
        return Mix(sources, image_folder, "skip", check_images, seed, paired, files=files), files
    return None, files
