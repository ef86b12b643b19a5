"""The file of samples: read entry by entry, checked, left on the disk."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc

import pytest
from PIL import Image

from llava_compodistill.errors import DataError
from llava_compodistill.train import records as reading
from llava_compodistill.train.records import Records

HUMAN = {"from": "human", "value": "<image>\nWhat is this?"}
GPT = {"from": "gpt", "value": "Red"}
TEXT = {"from": "human", "value": "What?"}


def save_images(folder):
    """Two images, and a third that cannot be read."""
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 56), "red").save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image at all")
    return folder


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path / "images")


def record(image="a.png", turns=(HUMAN, GPT), **more):
    entry = {"id": "x", "image": image, "conversations": list(turns), **more}
    if image is ...:
        del entry["image"]
    return entry


def check(records, images, mode="error", check_images=True):
    path = images.parent / "data.json"
    path.write_text(json.dumps(records))
    return list(Records(str(path), str(images), mode, check_images))


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, message",
    [
        ('[\n{"id": 1,\n"conversations": [}\n]', r"bad\.json, line 3: not valid JSON"),
        ("", r"bad\.json, line 1: not valid JSON"),
        ('[{"id": 1}', r"bad\.json, line 1: not valid JSON"),
        ('[{"id": 1}\n{"id": 2}]', r"bad\.json, line 2: not valid JSON"),
        ('[{"id": 1},\n]', r"bad\.json, line [12]: not valid JSON"),
        ('[{"id": 1}]\n\n]', r"bad\.json, line 3: not valid JSON"),
        ('\ufeff[{"id": 1}]', r"bad\.json, line 1: not valid JSON"),
        ('{"id": 1}', r"bad\.json: must hold a non-empty JSON list"),
        ("[]", r"bad\.json: must hold a non-empty JSON list"),
        (" [ ] ", r"bad\.json: must hold a non-empty JSON list"),
        ("[" * 100_000, r"bad\.json: a sample is nested too deeply"),
        ('[{"id": ' + "1" * 5_000 + "}]", r"bad\.json: .*5000 digits"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_a_file_that_is_no_list_of_samples(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Records(str(path), None, "skip")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match=r"bad\.json: not UTF-8 text"):
        Records(str(tmp_path / "bad.json"), None, "error")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"--data_path .*none\.json: there is no such file"):
        Records(str(tmp_path / "none.json"), None, "error")


ODD = [
    {
        "id": 1,
        "conversations": [{"from": "human", "value": "Größe? 日本 \U0001f600 \r\n x"}, {"from": "gpt", "value": "é"}],
    },
    {
        "conversations": [{"value": "a  b\tc", "from": "human"}, {"from": "gpt", "value": "d"}],
        "more": [1.5, {"x": None}],
    },
    {"id": None, "image": None, "conversations": [{"from": "human", "value": "["}, {"from": "gpt", "value": '"]}\\'}]},
    {"id": "last", "conversations": [{"from": "human", "value": "]"}, {"from": "gpt", "value": "2"}]},
]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("form", [{}, {"ensure_ascii": False}, {"indent": 3, "ensure_ascii": False}], ids=str)
def test_samples_are_what_json_reads_whatever_their_form(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    path = tmp_path / "odd.json"
    path.write_bytes(("\r\n " + json.dumps(ODD, **form).replace("\n", "\r\n") + "\n\n").encode())
    records = Records(str(path), None, "error")
    expected = [{k: v for k, v in entry.items() if (k, v) != ("image", None)} for entry in ODD]
    assert len(records) == len(expected) and list(records) == expected
    assert [records[index] for index in (2, -1, 0)] == [expected[index] for index in (2, -1, 0)]
    with pytest.raises(IndexError):
        records[len(expected)]


def test_samples_take_no_memory(tmp_path):
    path = tmp_path / "long.json"
    entry = {"conversations": [{"from": "human", "value": "x " * 5_000}, {"from": "gpt", "value": "y"}]}
    path.write_text(json.dumps([entry] * 1_000))
    tracemalloc.start()
    records = Records(str(path), None, "error")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 1_000 and held < 200_000 < path.stat().st_size / 20


def test_samples_stay_on_the_disk_and_a_changed_file_is_noticed(tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(ODD))
    records = Records(str(path), None, "error")
    copy = pickle.loads(pickle.dumps(records))  # for a worker that is not forked
    assert list(copy) == list(records)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ODD[::-1]))
    other.replace(path)
    assert records[3]["id"] == "last", "a new file in its place does no harm"
    with pytest.raises(DataError, match=r"odd\.json has been changed while it was in use"):
        pickle.loads(pickle.dumps(records))[0]
    path.write_text(json.dumps(ODD))
    records = Records(str(path), None, "error")
    path.write_text(json.dumps(ODD))
    assert list(records) == list(Records(str(path), None, "error")), "written again, but not changed"
    path.write_text(json.dumps(ODD[:1]))
    with pytest.raises(DataError, match=r"odd\.json has been changed while it was in use"):
        records[1]


# ---------------------------------------------------------------------------------------------------------------------
# The samples
# ---------------------------------------------------------------------------------------------------------------------
BAD = {
    "no object": ("a string", "not an object"),
    "no conversations": ({"id": "x"}, "no conversations"),
    "empty conversations": (record(turns=[]), "no conversations"),
    "a turn without value": (record(turns=[HUMAN, {"from": "gpt"}]), "a turn without 'from' or 'value'"),
    "a turn without speaker": (record(turns=[HUMAN, {"value": "Red"}]), "a turn without 'from' or 'value'"),
    "another speaker": (record(turns=[HUMAN, {**GPT, "from": "assistant"}]), "unknown speaker: 'assistant'"),
    "no answer": (record(turns=[HUMAN]), "no answer from gpt"),
    "nothing said": (record(..., turns=[{**TEXT, "value": ""}, {**GPT, "value": " "}]), "nothing but empty turns"),
    "marker without image": (record(...), "<image> in the text but no image"),
    "marker with a null image": (record(None), "<image> in the text but no image"),
    "image without marker": (record(turns=[TEXT, GPT]), "an image but no <image> in the text"),
    "two markers": (record(turns=[HUMAN, GPT, HUMAN, GPT]), "2 <image> markers for one image"),
    "several images": (record(["a.png", "b.png"]), "image must be one file name"),
    "missing image": (record("none.png"), r"missing image: .*none\.png"),
    "a marker in an answer": (
        record(turns=[TEXT, {**GPT, "value": "an <image>"}]),
        "<image> in an answer, where it would be learned as text",
    ),
    "two answers": (record(turns=[HUMAN, GPT, GPT]), "turns that do not alternate: human, gpt, gpt"),
    "two answers and no question": (record(turns=[GPT, GPT]), "turns that do not alternate: gpt, gpt"),
    "two questions": (record(turns=[HUMAN, TEXT, GPT]), "turns that do not alternate: human, human, gpt"),
    "an answer to nothing": (record(turns=[GPT]), "no answer from gpt"),
    "half a character": (record(turns=[HUMAN, {**GPT, "value": "\ud83d"}]), "a turn with half a character"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_named(images, case):
    bad, message = BAD[case]
    with pytest.raises(DataError, match=rf"(?s)data\.json: 1 of 3 samples.*sample 1 .*{message}.*--bad_samples skip"):
        check([record(), bad, record("b.png")], images)
    kept = check([record(), bad, record("b.png")], images, "skip")
    assert [entry["image"] for entry in kept] == ["a.png", "b.png"]


def test_a_count_by_kind_and_the_first_few_by_name(images):
    records = [record(f"missing-{number}.png", id=number) for number in range(12)] + [record(turns=[TEXT, GPT])]
    with pytest.raises(DataError) as error:
        check(records, images)
    text = str(error.value)
    assert "13 of 13 samples" in text and "12 x missing image" in text and "1 x an image but no <image>" in text
    assert "missing-4.png" in text and "missing-5.png" not in text


def test_nothing_usable_is_an_error_also_when_skipping(images):
    with pytest.raises(DataError, match="no usable sample is left"):
        check([record("none.png")], images, "skip")


def test_what_is_fine(images):
    records = [
        record(),
        record(..., turns=[TEXT, GPT]),
        record(None, turns=[TEXT, GPT]),
        record("b.png", turns=[GPT, HUMAN, GPT]),
    ]
    kept = check(records, images)
    assert len(kept) == 4
    assert "image" not in kept[2], "LLaVA asks whether the key is there"
    assert check([record("none.png")], images, check_images=False) == [record("none.png")]


# ---------------------------------------------------------------------------------------------------------------------
# Where images may lie
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def outside(images):
    """A file beside the folder of images, and a link in the folder that leads there."""
    Image.new("RGB", (8, 8)).save(images.parent / "secret.png")
    (images / "link.png").symlink_to(images.parent / "secret.png")
    (images / "sub").mkdir()
    return images


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "{root}/secret.png", "../images-2/a.png"])
def test_an_image_outside_the_folder_is_refused(outside, name):
    name = name.format(root=outside.parent)
    (outside.parent / "images-2").mkdir()
    Image.new("RGB", (8, 8)).save(outside.parent / "images-2" / "a.png")
    message = rf"1 x an image outside --image_folder \(--allow_outside_images True takes it.*{name}"
    with pytest.raises(DataError, match=f"(?s){message}"):
        check([record(name)], outside)
    assert [entry["image"] for entry in check([record(name), record()], outside, "skip")] == ["a.png"]
    path = str(outside.parent / "data.json")
    assert len(Records(path, str(outside), "error", allow_outside=True)) == 2
    with pytest.raises(DataError, match="missing image: "):  # the folder's name says nothing: another problem
        Records(path, "", "error")


@pytest.mark.parametrize("name", ["link.png", "sub/../a.png", "{images}/a.png", "./a.png"])
def test_an_image_inside_it_may_be_written_in_any_way(outside, name):
    assert len(check([record(name.format(images=outside))], outside)) == 1


def test_without_a_folder_images_lie_anywhere(outside):
    (outside.parent / "data.json").write_text(json.dumps([record(str(outside.parent / "secret.png"))]))
    assert len(Records(str(outside.parent / "data.json"), "", "error")) == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.json")
    for path in (tmp_path / "data.json", tmp_path):
        with pytest.raises(DataError, match=f"--data_path {path}: is no file"):
            Records(str(path), "", "error")
