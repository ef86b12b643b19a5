"""What a check has found: by kind, with a count, a few examples by name, and what to do. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import CompoDistillError

#: Levels: training cannot start; training refuses the sample, or skips it; training runs, but not as one might think.
STOPS, SKIPS, NOTE = "stops", "skips", "note"
LEVELS = (STOPS, SKIPS, NOTE)

_SHOWN = 3
_SKIP = "leave them out (below), or mend the records"
#: What to do, by the beginning of a kind.
REMEDIES = {
    "missing image": "get the files, correct --image_folder, or leave the samples out (below)",
    "<image> in the text but no image": "add the field image, or take <image> out of the text",
    "an image but no <image>": "put <image> into the first question",
    "image must be one file name": "training takes one image a sample: split the sample, or leave it out (below)",
    "the image cannot be decoded": "get the file again, or leave the samples out (below)",
    "no label is left": "give the --version that fits the tokenizer",
    "the conversation does not have the form": "--version plain takes one question with <image> and one answer; give "
    "the template of instructions for conversations",
    "weights: not here": "get the weights; --without_weights makes this a note",
}


@dataclass(frozen=True)
class Example:
    """One case of a finding. Those of single samples have the data file and the sample's index and id in it."""

    detail: str = ""
    file: str | None = None
    index: int | None = None
    id: Any = None


@dataclass
class Finding:
    kind: str
    level: str
    remedy: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)


class Findings:
    """Collects findings, and remembers which samples training cannot use.

    Attributes:
        unwanted: by data file, {index: {"index", "checksum", "id", "why"}} of samples that are not worth keeping.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}
        self.unwanted: dict[str, dict[int, dict[str, Any]]] = {}
        self._refused: set[tuple[str, int]] = set()

    def __iter__(self) -> Iterator[Finding]:
        order = {level: place for place, level in enumerate(LEVELS)}
        return iter(sorted(self._found.values(), key=lambda finding: (order[finding.level], -finding.count)))

    def add(self, level: str, problem: str, example: Example | None = None, remedy: str = "", count: int = 1) -> None:
        """Count a problem, "kind" or "kind: details".

        Args:
            example: names the sample; the problem's details are added to it.
            count: of samples with this problem.
        """
        kind, _, detail = problem.partition(": ")
        found = self._found.get((level, kind))
        if found is None:
            found = self._found[level, kind] = Finding(kind, level, remedy or _remedy(problem, level))
        found.count += count
        if len(found.examples) < _SHOWN:
            example = example or Example()
            found.examples.append(Example(detail or example.detail, example.file, example.index, example.id))

    def leave_out(self, file: str, index: int, checksum: int, name: Any, why: str, refused: bool = True) -> None:
        """Remember a sample for the list that --write_skip writes.

        Args:
            refused: whether training cannot read it; else it can, and learns nothing from it.
        """
        if refused:
            self._refused.add((file, index))
        entry = {"index": index, "checksum": checksum, "id": name, "why": why}
        self.unwanted.setdefault(file, {}).setdefault(index, entry)

    @contextlib.contextmanager
    def stopping(self, kind: str) -> Iterator[None]:
        """What is raised in here, as training would raise it, is a finding that stops training."""
        try:
            yield
        except (CompoDistillError, ValueError, OSError, ImportError) as error:
            self.add(STOPS, f"{kind}: {error}", remedy="see the message")

    @property
    def stops(self) -> bool:
        return any(finding.level == STOPS for finding in self._found.values())

    @property
    def skips(self) -> bool:
        return any(finding.level == SKIPS for finding in self._found.values())

    @property
    def refused(self) -> int:
        """Samples that training cannot read, however many things are wrong with them."""
        return len(self._refused)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(finding) for finding in self]


def _remedy(problem: str, level: str) -> str:
    for beginning, remedy in REMEDIES.items():
        if problem.startswith(beginning):
            return remedy
    return _SKIP if level == SKIPS else ""
