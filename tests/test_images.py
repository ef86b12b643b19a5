"""Images as they are opened for everything: what is allowed, how large, what pixels mean, and what errors say."""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava_compodistill.errors import DataError, ImageError
from llava_compodistill.eval.marks import Masks, open_picture
from llava_compodistill.eval.pictures import MakePixels, Unreadable
from llava_compodistill.hosts.llava.images import VARIABLE, as_llava_opens, open_rgb, prepared_for
from llava_compodistill.hosts.llava.runner import opening_images

pytestmark = pytest.mark.once  # nothing here depends on transformers

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.fixture
def picture(tmp_path):
    """Saves pixels and returns the file's name."""

    def save(pixels, name="image.png", mode=None, **options):
        image = Image.fromarray(np.asarray(pixels)) if not isinstance(pixels, Image.Image) else pixels
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    return save


@pytest.fixture
def thin(picture):
    return picture(np.zeros((10, 200, 3), np.uint8), "thin.png")


# ---------------------------------------------------------------------------------------------------------------------
# What is no image
# ---------------------------------------------------------------------------------------------------------------------
def test_a_file_that_would_start_another_program_is_refused(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "photo.png").write_bytes(EPS)
    for source, name in ((str(tmp_path / "photo.png"), "photo.png"), (EPS, "the image")):
        with pytest.raises(ImageError, match=rf"{name}: cannot be read as an image \(it is none of JPEG, PNG"):
            open_rgb(source)
    assert not started
    with contextlib.suppress(AssertionError):  # it gave no picture
        Image.open(tmp_path / "photo.png").load()
    assert started  # by PIL alone


@pytest.mark.parametrize(
    "kind, reason", [
        ("gone", "there is no such file"), ("empty", "none of JPEG"), ("text", "none of JPEG"), ("cut", "truncated"),
        ("folder", "it is no file"), ("pipe", "it is no file"), ("\0", "there is no such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(picture, tmp_path, monkeypatch, kind, reason):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    path = tmp_path / f"{kind}.png"
    if kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
    elif kind == "cut":
        whole = picture(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), "whole.png")
        path.write_bytes(open(whole, "rb").read()[:900])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ImageError, match=f"{path.name}: cannot be read as an image .*{reason}"):
        open_rgb(str(path))
    assert sys.modules["PIL.ImageFile"].LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    "error", [kind("x") for kind in (SyntaxError, NotImplementedError, RuntimeError, TypeError, MemoryError, KeyError)]
)  # fmt: skip
def test_whatever_a_decoder_raises_is_one_kind_of_error(picture, monkeypatch, error):
    def load(self):
        raise error

    path = picture(np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match=rf"image.png: cannot be read as an image \({type(error).__name__}: '?x"):
        open_rgb(path)


# ---------------------------------------------------------------------------------------------------------------------
# What pixels mean
# ---------------------------------------------------------------------------------------------------------------------
DEPTHS = {
    "16 bits": (np.array([[0, 128, 129, 32896, 65535]], np.uint16), ".png", [0, 0, 1, 128, 255]),
    "16 bits, TIFF": (np.array([[0, 257, 65535]], np.uint16), ".tif", [0, 1, 255]),
    "fractions": (np.array([[0, 0.25, 0.501, 1]], np.float32), ".tif", [0, 64, 128, 255]),
    "32 bits like 8": (np.array([[0, 7, 255]], np.int32), ".tif", [0, 7, 255]),
    "8 bits": (np.array([[0, 7, 255]], np.uint8), ".png", [0, 7, 255]),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_depths_become_eight_bits(picture, kind):
    pixels, suffix, expected = DEPTHS[kind]
    image = open_rgb(picture(pixels, f"deep{suffix}"))
    assert image.mode == "RGB" and np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize(
    "pixels, reason", [
        (np.array([[0, np.nan]], np.float32), "NaN or infinite"),
        (np.array([[0, 200.0]], np.float32), "fractions from 0 to 200, must be from 0 to 1"),
        (np.array([[-1, 0]], np.float32), "fractions from -1 to 0"),
        (np.array([[0, 70_000]], np.int32), "integers of 32 bits from 0 to 70000.*8 or 16 bits"),
    ],
)  # fmt: skip
def test_values_without_a_meaning_are_refused(picture, pixels, reason):
    with pytest.raises(ImageError, match=f"deep.tif: .*{reason}"):
        open_rgb(picture(pixels, "deep.tif"))


def test_pixels_stay_as_they_are_stored(picture):
    """LLaVA passes over EXIF's orientation, and drops what is transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (8, 4))
    assert open_rgb(picture(wide, "turned.jpg", exif=exif)).size == (8, 4)
    assert open_rgb(picture(Image.new("RGBA", (1, 1), (9, 8, 7, 0)))).getpixel((0, 0)) == (9, 8, 7)


# ---------------------------------------------------------------------------------------------------------------------
# How large
# ---------------------------------------------------------------------------------------------------------------------
CLIP, SIGLIP = SimpleNamespace(size={"shortest_edge": 56}), SimpleNamespace(size={"height": 56, "width": 56})


@pytest.mark.parametrize(
    "aspect_ratio, processor, message", [
        ("pad", SIGLIP, "200 x 10 pixels, padded to a square, are 0 megapixels, and the most is 0.01"),
        ("square", CLIP, "200 x 10 pixels, with the shorter side made 56 pixels, are 0 megapixels"),
        ("square", SIGLIP, None), (None, None, None), ("anyres", CLIP, None),
    ],
)  # fmt: skip
def test_an_image_may_not_become_larger_than_the_limit(thin, monkeypatch, aspect_ratio, processor, message):
    monkeypatch.setenv(VARIABLE, "0.01")
    with prepared_for(aspect_ratio, processor):
        if message is None:
            assert open_rgb(thin).size == (200, 10)
        else:
            with pytest.raises(ImageError, match=f"thin.png: {message}.*{VARIABLE} sets another limit"):
                open_rgb(thin)
    assert open_rgb(thin).size == (200, 10)  # nothing is padded any more
    monkeypatch.setenv(VARIABLE, "0.001")
    with pytest.raises(ImageError, match="thin.png: 200 x 10 pixels are 0 megapixels"):
        open_rgb(thin)


def test_by_default_a_thin_image_does_not_fill_the_memory(picture):
    path = picture(Image.new("1", (20_000, 10)), "line.png")
    with prepared_for("pad", SIGLIP), pytest.raises(ImageError, match="square, are 400 megapixels, .* most is 100"):
        open_rgb(path)
    assert open_rgb(path).size == (20_000, 10)


def test_the_limit_can_be_raised_beyond_that_of_pil(picture, monkeypatch):
    path = picture(np.zeros((20, 20, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=f"image.png: .*decompression bomb.*{VARIABLE}"):
        open_rgb(path)
    monkeypatch.setenv(VARIABLE, "1")
    assert open_rgb(path).size == (20, 20)


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(picture, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(DataError, match=f"{VARIABLE}={value}: must be a number of megapixels above 0") as caught:
        open_rgb(picture(np.zeros((4, 4, 3), np.uint8)))
    assert not isinstance(caught.value, ImageError)  # no sample's fault, which --bad_samples skip would pass over


# ---------------------------------------------------------------------------------------------------------------------
# Who opens them
# ---------------------------------------------------------------------------------------------------------------------
def test_the_evaluation_names_what_it_cannot_open(thin, picture, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0.01")
    make = MakePixels(lambda *_: [], SIGLIP, SimpleNamespace(image_aspect_ratio="pad"), None)
    found = make(thin)
    assert isinstance(found, Unreadable) and str(found).startswith(f"{thin}: 200 x 10 pixels, padded")
    (tmp_path / "mask.png").write_bytes(EPS)
    file = picture(np.zeros((4, 4, 3), np.uint8), "plain.png")
    with pytest.raises(ImageError, match=r"mask\.png: cannot be read as an image \(it is none of"):
        open_picture(Masks(file, str(tmp_path / "mask.png"), ("red",)))


def test_llavas_evaluation_opens_images_as_we_do(tmp_path, picture):
    (tmp_path / "photo.png").write_bytes(EPS)
    deep = picture(DEPTHS["16 bits"][0], "deep.png")
    before = Image.open
    with opening_images("llava.eval.model_vqa_loader"):
        with pytest.raises(ImageError, match=r"photo\.png: cannot be read"):
            Image.open(str(tmp_path / "photo.png"))
        assert Image.open(deep).convert("RGB").getpixel((3, 0)) == (128, 128, 128)
        with open(deep, "rb") as file:
            assert Image.open(file).size == (5, 1)
    assert Image.open is before
    with opening_images("llava.serve.cli"):
        assert Image.open is before


def test_registered_llava_opens_and_pads_images_as_we_do(thin, monkeypatch):
    from llava_compodistill.hosts.llava import register, unregister
    from llava_compodistill.hosts.llava.host import import_llava

    register(train=True)
    train, utilities = import_llava("llava.train.train"), import_llava("llava.mm_utils")
    assert train.Image.open is as_llava_opens and train.Image.new is Image.new
    monkeypatch.setenv(VARIABLE, "0.01")
    with pytest.raises(ImageError, match="an image: 200 x 10 pixels, padded to a square"):
        utilities.expand2square(open_rgb(thin), (0, 0, 0))
    monkeypatch.delenv(VARIABLE)
    assert utilities.expand2square(open_rgb(thin), (0, 0, 0)).size == (200, 200)
    unregister()
    try:
        assert train.Image is Image and utilities.expand2square.__module__ == "llava.mm_utils"
    finally:
        register(train=True)
