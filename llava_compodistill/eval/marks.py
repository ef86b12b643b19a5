"""Images with objects marked in them: a request's image may be one of these instead of a file's name.

They stand for their file wherever a path is asked for, and are drawn when the image is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageError

#: R-Bench's colours of masks, red, green, blue and how opaque, each of 255.
_OVERLAYS = {"red": (250, 0, 45, 120), "green": (100, 250, 0, 120)}
_LINE = 4


@dataclass(frozen=True)
class _Marked:
    """A file with something drawn into it."""

    file: str

    def __fspath__(self) -> str:
        return self.file

    __str__ = __fspath__


@dataclass(frozen=True)
class Boxes(_Marked):
    """Rectangles around objects, as R-Bench draws them.

    Attributes:
        file: the image.
        boxes: (left, top, right, bottom) each, in shares of the image's width and height.
        colors: one a box.
    """

    boxes: tuple[tuple[float, ...], ...]
    colors: tuple[str, ...]

    def marks(self) -> list[Any]:
        """What tells it from the plain image."""
        return [self.boxes, self.colors]

    def drawn(self, image: Any) -> Any:
        """The PIL image with the boxes in it, four pixels wide."""
        from PIL import ImageDraw

        image = image.copy()
        pen = ImageDraw.Draw(image)
        for (left, top, right, bottom), color in zip(self.boxes, self.colors, strict=True):
            edges = (left * image.width, top * image.height, right * image.width, bottom * image.height)
            pen.rectangle(edges, outline=color, width=_LINE)
        return image


@dataclass(frozen=True)
class Masks(_Marked):
    """Objects under a veil of colour, as R-Bench draws them.

    Attributes:
        file: the image.
        mask: an image of any size whose pixels are 0, or n where the n-th object is.
        colors: one an object, of `_OVERLAYS`.
    """

    mask: str
    colors: tuple[str, ...]

    def marks(self) -> list[Any]:
        """What tells it from the plain image."""
        return [Path(self.mask).name, self.colors]

    def drawn(self, image: Any) -> Any:
        """The RGB image under its veils. The mask is stretched to the image's size without new values."""
        import numpy as np
        from PIL import Image

        from ..hosts.llava.images import open_as_it_is

        mask = np.asarray(open_as_it_is(self.mask).resize(image.size, Image.Resampling.NEAREST))
        if mask.ndim != 2:
            raise ImageError(f"its mask {self.mask} has {mask.shape[-1]} channels, must have one")
        image = image.copy()
        for number, color in enumerate(self.colors, start=1):
            *rgb, opaque = _OVERLAYS[color]
            image.paste(tuple(rgb), (0, 0), Image.fromarray(np.where(mask == number, opaque, 0).astype(np.uint8)))
        return image


Picture = str | Boxes | Masks


def open_picture(picture: Picture) -> Any:
    """The picture in RGB, with its marks.

    Raises:
        ImageError: as `open_rgb`, for the picture or its mask.
    """
    from ..hosts.llava.images import open_rgb

    image = open_rgb(picture)
    return image if isinstance(picture, str) else picture.drawn(image)
