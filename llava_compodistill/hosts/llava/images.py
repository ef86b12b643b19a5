"""The one place where images are opened: for training, evaluation and analyses, and for LLaVA's own modules.

What PIL makes of a file depends on its content, not its name: an EPS file named .png would start Ghostscript, a 16-bit
one turns white, and a thin one fills the memory when it is padded to a square. Here formats are allowed by name, sizes
have a limit, and whatever is wrong is an `ImageError` that names the file.

The pixels stay as they are stored: LLaVA passes over the orientation that a camera writes into EXIF, and models have
learned so. Of a file with several frames it is the first.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from ...errors import DataError, ImageError

#: PIL's names. Not among them: what starts other programs (EPS), and what no data set of images holds.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "MPO", "AVIF")
#: The environment variable with the most pixels, in millions, that an image may have, padding included.
VARIABLE = "COMPODISTILL_MAX_MEGAPIXELS"
MEGAPIXELS = 100.0
#: Bytes of memory a pixel takes at its peak, from opening to the vision tower: measured.
_BYTES = 12

#: PIL's own, also while `as_llava_opens` stands in its place.
_open = Image.open
_next: contextvars.ContextVar[tuple[str | None, Any]] = contextvars.ContextVar("next", default=(None, None))


def most_pixels() -> float:
    """The most pixels of an image.

    Raises:
        DataError: when the variable holds no number.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        megapixels = float(text) if text else MEGAPIXELS
    except ValueError:
        megapixels = math.nan
    if not 0 < megapixels < math.inf:
        raise DataError(f"{VARIABLE}={text}: must be a number of megapixels above 0.")
    return 1e6 * megapixels


@contextlib.contextmanager
def prepared_for(aspect_ratio: str | None, processor: Any) -> Iterator[None]:
    """In here images are opened to be made pixels of in this way; that decides how large they become.

    Args:
        aspect_ratio: LLaVA's `image_aspect_ratio`: pad, anyres, or another.
        processor: the tower's image processor.
    """
    token = _next.set((aspect_ratio, processor))
    try:
        yield
    finally:
        _next.reset(token)


def open_rgb(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """An image in RGB, whole.

    Args:
        source: a file, or its content.
        name: how messages call it; the file by default.

    Raises:
        ImageError: naming the file, when it is missing, damaged, cut off, of another format or too large, and when its
            values have no meaning as eight bits.
    """
    return _opened(source, name, _to_rgb)


def open_as_it_is(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """As `open_rgb`, with the values that the file has: for masks."""
    return _opened(source, name, lambda image: image.copy())


def _opened(source: Any, name: str | None, take: Callable[[Image.Image], Image.Image]) -> Image.Image:
    content = isinstance(source, bytes)
    name = name or ("the image" if content else os.fspath(source))
    if not content and not os.path.isfile(source):  # a pipe would be waited for
        what = "it is no file" if os.path.exists(source) else "there is no such file"
        raise ImageError(f"{name}: cannot be read as an image ({what}).")
    limit = most_pixels()
    # PIL's own limit is for whoever has not thought of one; a larger one that was asked for holds in its place.
    if os.environ.get(VARIABLE) and Image.MAX_IMAGE_PIXELS and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(limit / 2)
    try:
        with _whole_files_alone(), _open(io.BytesIO(source) if content else source, formats=_known()) as image:
            _check_size(image.size, name, limit)
            return take(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}, or its beginning is damaged"
    except Image.DecompressionBombError as error:
        reason = f"{str(error).rstrip('.')}. {VARIABLE} sets another limit"
    except _Meaningless as error:
        reason = str(error)
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, MemoryError
        reason = f"{type(error).__name__}: {error}"
    raise ImageError(f"{name}: cannot be read as an image ({reason}).")


class _Meaningless(ValueError):
    """Values that cannot be shown in eight bits without guessing."""


def _known() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _whole_files_alone() -> Iterator[None]:
    """In here a file that is cut off is an error, whatever another library has told PIL."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_levels((np.asarray(image).astype(np.uint32) + 128) // 257)
    if image.mode == "I":
        values = np.asarray(image)
        if image.format in ("PNG", "PPM"):  # older releases of PIL read 16 bits so
            return _from_levels((values.clip(0, 65535).astype(np.uint32) + 128) // 257)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise _Meaningless(
                f"its pixels are integers of 32 bits from {low} to {high}, of which no range is known to be black to "
                "white: save it with 8 or 16 bits"
            )
        return _from_levels(values)
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise _Meaningless("some of its pixels are NaN or infinite")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            raise _Meaningless(f"its pixels are fractions from {low:g} to {high:g}, must be from 0 to 1")
        return _from_levels(np.rint(values * 255))
    return image.convert("RGB")


def _from_levels(values: np.ndarray) -> Image.Image:
    """[H, W] of 0 to 255."""
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------
def _check_size(size: tuple[int, int], name: str, limit: float) -> None:
    width, height = size
    what, pixels = _largest(width, height, *_next.get())
    if pixels > limit:
        raise ImageError(
            f"{name}: {width} x {height} pixels{what} are {pixels / 1e6:,.0f} megapixels, and the most is "
            f"{limit / 1e6:g}. {VARIABLE} sets another limit; a megapixel takes about {_BYTES} MB of memory."
        )


def _largest(width: int, height: int, aspect_ratio: str | None, processor: Any) -> tuple[str, float]:
    """How many pixels an image has at its largest on the way to the vision tower, and by what."""
    longer, shorter = max(width, height), max(1, min(width, height))
    if aspect_ratio == "pad":
        return ", padded to a square,", longer**2
    size = getattr(processor, "size", None)
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else getattr(size, "shortest_edge", None)
    if edge and aspect_ratio != "anyres" and edge**2 * longer / shorter > width * height:
        return f", with the shorter side made {edge} pixels,", edge**2 * longer / shorter
    return "", width * height


def checked_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    """LLaVA's `expand2square` with the limit, for those who have opened their images elsewhere."""

    def expand2square(pil_img, background_color):
        token = _next.set(("pad", None))
        try:
            _check_size(pil_img.size, "an image", most_pixels())
        finally:
            _next.reset(token)
        return original(pil_img, background_color)

    return expand2square


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA's own modules
# ---------------------------------------------------------------------------------------------------------------------
def as_llava_opens(fp: Any, mode: str = "r", formats: Any = None) -> Image.Image:
    """Stands for `PIL.Image.open` in LLaVA's modules, which convert what it gives to RGB."""
    return open_rgb(fp.read() if hasattr(fp, "read") else fp)


class ImagesOfLlava:
    """Stands for the module `PIL.Image` in one of LLaVA's."""

    open = staticmethod(as_llava_opens)

    def __getattr__(self, name: str) -> Any:
        return getattr(Image, name)
