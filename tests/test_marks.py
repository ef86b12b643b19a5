"""Objects marked in images, against pixels worked out by hand as R-Bench's own tools colour them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_compodistill.errors import DataError
from llava_compodistill.eval.benchmarks import get
from llava_compodistill.eval.marks import Boxes, Masks, open_picture
from miniature.benchmarks import write_benchmarks

pytestmark = pytest.mark.once  # nothing here depends on transformers

COLORS = ("red", "green")


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png"), pixels


def test_boxes_are_four_pixels_wide_and_later_ones_on_top(image):
    file, expected = image
    expected = expected.copy()
    boxes = ((0.25, 0.2, 0.75, 0.8), (0.0, 0.0, 0.5, 0.5))
    for (left, top, right, bottom), color in zip(boxes, ((255, 0, 0), (0, 128, 0)), strict=True):
        x0, y0, x1, y1 = (int(edge) for edge in (left * 40, top * 30, right * 40, bottom * 30))
        outside = np.zeros((30, 40), dtype=bool)
        outside[y0 : y1 + 1, x0 : x1 + 1] = True
        outside[y0 + 4 : y1 - 3, x0 + 4 : x1 - 3] = False
        expected[outside] = color
    assert np.array_equal(np.asarray(open_picture(Boxes(file, boxes, COLORS))), expected)
    assert np.array_equal(np.asarray(open_picture(file)), image[1])  # the file itself is as it was


def test_masks_are_stretched_and_blended(image, tmp_path):
    file, pixels = image
    mask = np.random.default_rng(1).integers(0, 4, (3, 5), dtype=np.uint8)  # 3 belongs to nobody
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = ((np.arange(30) + 0.5) * 3 / 30).astype(int)
    columns = ((np.arange(40) + 0.5) * 5 / 40).astype(int)
    wide = mask[rows][:, columns]
    expected = pixels.astype(float)
    for number, color in ((1, (250, 0, 45)), (2, (100, 250, 0))):
        opaque = 120 / 255
        expected[wide == number] = (1 - opaque) * expected[wide == number] + opaque * np.array(color)
    found = np.asarray(open_picture(Masks(file, str(tmp_path / "mask.png"), COLORS))).astype(float)
    assert np.abs(found - expected).max() <= 1  # rounding
    assert np.array_equal(found[wide % 3 == 0], pixels[wide % 3 == 0])


def test_a_mask_of_colours_is_refused(image, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match="mask.png has 3 channels"):
        open_picture(Masks(image[0], str(tmp_path / "mask.png"), COLORS))


@pytest.fixture
def data(world, tmp_path):
    write_benchmarks(world["data"], tmp_path / "eval")
    return tmp_path / "eval"


def change(data, **changes):
    path = data / "rbench" / "instance-level_filterd.json"
    entries = json.loads(path.read_text())
    entries[0] |= changes
    path.write_text(json.dumps(entries))


def test_questions_name_the_marks_as_the_authors_tools_do(data):
    plain, boxes, masks = (get(name).load(data)[0] for name in ("rbench", "rbench-box", "rbench-mask"))
    entry = json.loads((data / "rbench" / "instance-level_filterd.json").read_text())[0]
    one, two = entry["subject"], entry["object"]
    for item, mark in ((boxes, "bounding box"), (masks, "mask")):
        expected = plain.prompt.replace(one, f"{one} in red {mark}").replace(two, f"{two} in green {mark}")
        assert item.prompt == expected and plain.prompt != expected
    # Every mention, and an object within what was already marked: the text is replaced twice, one after the other.
    change(data, text="Is the man on the horse? The man.", subject="Man", object="red")
    man = "man in red in green bounding box bounding box"
    assert get("rbench-box").load(data)[0].prompt == f"Is the {man} on the horse? The {man}."


def test_the_miniatures_marks_are_where_its_objects_are(data):
    """The pixels within a box hold the colour that the question names."""
    named = {"red": (214, 40, 40), "blue": (45, 85, 215), "green": (40, 160, 70)}
    seen = 0
    for item in get("rbench-box").load(data):
        color = item.prompt.split()[2]
        if color in named:
            image = Image.open(Path(item.images[0])).convert("RGB")
            left, top, right, bottom = item.images[0].boxes[0]
            pixels = np.asarray(image.crop((left * 42, top * 42, right * 42, bottom * 42))).reshape(-1, 3).astype(int)
            seen += 1
            assert (np.abs(pixels - named[color]).max(axis=1) < 40).sum() > 10, item
    assert seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sub_box": [0.5, 0, 0.2, 1]}, "entry 0: sub_box must be .left, top, right, bottom. in shares"),
        ({"obj_box": [0, 0, 30, 40]}, "entry 0: obj_box must be"),
        ({"subject": ""}, "entry 0: subject must be a text"),
    ],
)
def test_wrong_marks_are_named(data, changes, message):
    change(data, **changes)
    with pytest.raises(DataError, match=message):
        get("rbench-box").load(data)


def test_a_missing_mask_is_named(data):
    (data / "rbench" / "instance_mask" / "0.png").unlink()
    with pytest.raises(DataError, match="entry 0: its mask .*0.png is missing"):
        get("rbench-mask").load(data)


def test_marks_make_another_question(data):
    """Of one image with other marks; not of the folder that it lies in."""
    item = get("rbench-box").load(data)[0]
    before = item.asked()
    change(data, sub_box=[0, 0, 1, 1])
    assert get("rbench-box").load(data)[0].asked() != before
