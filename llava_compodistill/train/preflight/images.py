"""Every image decoded, as training decodes it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...errors import ImageError
from ...hosts.llava.images import open_rgb, prepared_for
from .processes import in_processes

_CHUNK = 32
#: Pixels of the square that an image is padded to, from which on a note is made: 3 bytes each, several copies.
LARGE_SQUARE = 25_000_000
#: Modes that do not simply hold eight bits of red, green and blue, and what becomes of them.
_MODES = {
    "I;16": "16 bits a channel",
    "I;16B": "16 bits a channel",
    "I": "32 bits a channel",
    "F": "floating point",
    "CMYK": "CMYK",
    "RGBA": "an alpha channel",
    "LA": "an alpha channel",
    "PA": "an alpha channel",
}


@dataclass(frozen=True)
class Picture:
    """What an image file is.

    Attributes:
        notes: what may not be meant, "kind: details" each.
        problem: why training cannot read it.
    """

    path: str
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Use:
    """What training makes of an image.

    Attributes:
        aspect_ratio: LLaVA's `image_aspect_ratio`.
        size: the image processor's, as its config has it.
    """

    aspect_ratio: str | None
    size: Mapping[str, int] | None = None

    @property
    def padded(self) -> bool:
        return self.aspect_ratio == "pad"


def use_of(aspect_ratio: str | None, tower: str | None) -> Use:
    """How images become pixels for a vision tower; where its processor is not here, only the aspect ratio counts."""
    from transformers import CLIPImageProcessor

    try:
        size = CLIPImageProcessor.get_image_processor_dict(tower)[0].get("size") if tower else None
    except (OSError, ValueError):
        size = None
    if isinstance(size, int):  # of an old config
        size = {"shortest_edge": size}
    return Use(aspect_ratio, dict(size) if isinstance(size, Mapping) else None)


def inspect(path: str, use: Use) -> Picture:
    """Decode an image, as training does."""
    padded = use.padded
    try:
        with prepared_for(use.aspect_ratio, use):
            open_rgb(path)
    except ImageError as error:
        return Picture(path, problem=f"the image cannot be decoded: {error}")
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:  # its header, which has just been read without an error
            found: dict[str, Any] = {"format": image.format or "?", "mode": image.mode}
            found |= {"width": image.width, "height": image.height}
            if "transparency" in image.info and image.mode == "P":
                notes.append(f"an image with an alpha channel: {path} (P)")
    if found["mode"] in _MODES:
        notes.append(f"an image with {_MODES[found['mode']]}: {path} ({found['mode']})")
    if found["width"] * found["height"] > (Image.MAX_IMAGE_PIXELS or float("inf")):
        notes.append(f"an image that Pillow takes for a decompression bomb: {path}, {_size(found)}")
    square = max(found["width"], found["height"]) ** 2
    if padded and square > LARGE_SQUARE:
        notes.append(
            f"an image that is padded to a very large square: {path}, {_size(found)}, {square / 1e6:.0f} megapixels"
        )
    return Picture(path, **found, notes=tuple(notes))


def _size(found: dict[str, Any]) -> str:
    return f"{found['width']} x {found['height']}"


def inspect_all(
    paths: Sequence[str], use: Use, workers: int, done: Callable[[int], None] = lambda read: None
) -> Iterator[Picture]:
    """Decode images in several processes."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    yield from in_processes(_inspect_some, use, chunks, min(workers, len(chunks)), done)


def _inspect_some(use: Use, paths: Sequence[str]) -> list[Picture]:
    return [inspect(path, use) for path in paths]


@dataclass
class Summary:
    """What the images of a mix are."""

    formats: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    damaged: int = 0

    def add(self, picture: Picture) -> None:
        if picture.problem is not None:
            self.damaged += 1
            return
        self.formats[picture.format] += 1
        self.modes[picture.mode] += 1
        self.widths.append(picture.width)
        self.heights.append(picture.height)

    def as_json(self) -> dict[str, Any]:
        sides = {}
        for name, values in (("width", sorted(self.widths)), ("height", sorted(self.heights))):
            if values:
                sides[name] = {"least": values[0], "median": values[len(values) // 2], "most": values[-1]}
        return {
            "decoded": len(self.widths),
            "damaged": self.damaged,
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            **sides,
        }
