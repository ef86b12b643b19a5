"""Bad input: a clear error before training, or, asked to skip, a log entry and training on the rest."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image
from transformers import AutoTokenizer

from llava_compodistill.errors import DataError
from llava_compodistill.train import records as reading
from llava_compodistill.train.data import CheckedDataset
from llava_compodistill.train.records import Records

HUMAN = {"from": "human", "value": "<image>\nWhat is this?"}
GPT = {"from": "gpt", "value": "Red"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 56), "red").save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image at all")
    return folder


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
TEXT = {"from": "human", "value": "What?"}
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
# The data set
# ---------------------------------------------------------------------------------------------------------------------
def dataset(world, images, tmp_path, records, bad_samples="error", **changes):
    from transformers import SiglipImageProcessor

    from llava_compodistill.hosts.llava import register
    from llava_compodistill.hosts.llava.templates import prepare_tokenizer, use_template

    register(train=True)
    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]), use_fast=False, model_max_length=512)
    prepare_tokenizer(tokenizer, use_template(changes.pop("version", "qwen_1_5")))
    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    processor.crop_size = {"height": 56, "width": 56}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    values = {
        "image_folder": str(images),
        "image_aspect_ratio": "square",
        "image_processor": processor,
        "is_multimodal": True,
        "mm_use_im_start_end": False,
        "bad_samples": bad_samples,
        "check_images": True,
        **changes,
    }
    return CheckedDataset(str(path), tokenizer, SimpleNamespace(**values))


def test_an_unreadable_image_names_itself_when_it_is_read(world, images, tmp_path):
    data = dataset(world, images, tmp_path, [record(), record("broken.png", id="the one")])
    assert data[0]["image"].shape == (3, 56, 56)
    with pytest.raises(DataError, match=r"sample 'the one' \(image 'broken\.png'\): .*--bad_samples skip"):
        data[1]


def test_skipping_an_unreadable_image_takes_the_next_sample_and_says_so(world, images, tmp_path, caplog):
    data = dataset(world, images, tmp_path, [record("b.png"), record("broken.png", id="the one")], "skip")
    assert data[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()
    assert "Skipped sample 'the one'" in caplog.text
    nothing = dataset(world, images, tmp_path, [record("broken.png")], "skip")
    with pytest.raises(DataError, match="No sample of the data can be used"):
        nothing[0]


@pytest.mark.parametrize(
    "error", [SyntaxError("broken PNG file"), NotImplementedError(), RuntimeError("x"), TypeError(), KeyError("x")]
)
def test_whatever_the_decoder_raises_names_the_sample(world, images, tmp_path, monkeypatch, error):
    data = dataset(world, images, tmp_path, [record("b.png"), record(id="the one")])
    skipping = dataset(world, images, tmp_path, [record("b.png"), record(id="the one")], "skip")

    def convert(image, *args, original=Image.Image.convert, **options):
        if image.filename.endswith("a.png"):
            raise error
        return original(image, *args, **options)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.convert", convert)
    with pytest.raises(DataError, match=rf"sample 'the one' .*cannot be decoded \({type(error).__name__}"):
        data[1]
    assert skipping[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()


def test_a_decompression_bomb_is_a_bad_sample(world, images, tmp_path, monkeypatch):
    data = dataset(world, images, tmp_path, [record(..., turns=[TEXT, GPT]), record(id="bomb")], "skip")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert data[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()
    data.data_args.bad_samples = "error"
    with pytest.raises(DataError, match="'bomb'.*DecompressionBombError"):
        data[1]


def test_an_error_that_is_not_the_samples_is_not_passed_over(world, images, tmp_path, monkeypatch):
    data = dataset(world, images, tmp_path, [record("b.png"), record()], "skip")
    monkeypatch.setattr(data.data_args.image_processor, "preprocess", None)
    with pytest.raises(TypeError, match="not callable"):
        data[0]


def test_lengths_are_llavas(world, images, tmp_path):
    from llava_compodistill.hosts.llava.training import LazySupervisedDataset

    more = [record(), record(..., turns=[TEXT, GPT]), record(None, turns=[TEXT, {**GPT, "value": "a  b\nc"}])]
    data = dataset(world, images, tmp_path, more)
    for name in ("lengths", "modality_lengths"):
        assert getattr(data, name) == getattr(LazySupervisedDataset, name).fget(data)
    assert len(set(data.modality_lengths)) == 3


def test_reading_says_how_much_and_how_long(world, images, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="llava_compodistill")
    dataset(world, images, tmp_path, [record(), record(..., turns=[TEXT, GPT])])
    assert re.search(r"Reading the samples of .*data\.json \(0\.0 MiB\)", caplog.text)
    assert re.search(r"2 samples, 1 with an image, checked in \d+\.\d s", caplog.text)


def test_a_null_image_is_a_sample_of_text(world, images, tmp_path):
    data = dataset(world, images, tmp_path, [record(None, turns=[TEXT, GPT]), record()])
    assert not data[0]["image"].any() and (data[0]["input_ids"] >= 0).all()
    assert data.modality_lengths[0] < 0 < data.modality_lengths[1]


def test_a_conversation_that_the_template_cannot_take_names_itself(world, images, tmp_path):
    """LLaVA's `plain` asserts one question and one answer, and says nothing."""
    data = dataset(world, images, tmp_path, [record(turns=[HUMAN, GPT, TEXT, GPT], id="long")], version="plain")
    with pytest.raises(DataError, match=r"sample 'long'.*the form that the template asks for"):
        data[0]


def test_a_template_that_masks_everything_names_template_and_tokenizer(world, images, tmp_path):
    data = dataset(world, images, tmp_path, [record()], version="v1")
    with pytest.raises(DataError, match=r"(?s)no label is left.*template 'v1' .*Qwen2Tokenizer.*--version qwen_1_5"):
        data[0]


def test_images_may_be_named_from_the_working_folder(world, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = dataset(world, images, tmp_path, [record("images/a.png")], image_folder=None)
    assert data[0]["image"].shape == (3, 56, 56)


# ---------------------------------------------------------------------------------------------------------------------
# Through the entry point: before any long work, with nothing half-written
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def stage(world, teacher_path, tmp_path):
    def run(name="dft", **changes):
        values = {"teacher_model_path": teacher_path, "mm_projector_type": "mlp2x_gelu", **changes}
        output = tmp_path / "out"
        try:
            return tiny.run(world, name, output, **values)
        except Exception:
            assert not output.exists() or not list(output.rglob("*.safetensors")) + list(output.rglob("*.bin"))
            raise

    return run


def test_skipped_samples_are_logged_and_the_rest_trains(world, stage, tmp_path, caplog):
    records = json.loads((world["data"] / "instruct_student.json").read_text())[:6]
    records[1]["image"] = "none.png"
    shutil.copy(world["data"] / "images" / records[2]["image"], tmp_path / "saved.png")
    path = tmp_path / "some.json"
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"(?s)some\.json: 1 of 6.*none\.png"):
        stage(data_path=path)
    trainer = stage(data_path=path, bad_samples="skip")
    assert len(trainer.train_dataset) == 5
    assert "1 x missing image" in caplog.text and "left out" in caplog.text
    assert len(tiny.read_log(tmp_path / "out")) == 2


def test_another_tokenizer_is_refused(world, stage, teacher_path, tmp_path):
    other = tmp_path / "llava-other"
    shutil.copytree(teacher_path, other)
    for name in ("tokenizer.json", "vocab.json"):  # transformers 5 and 4
        if (other / name).is_file():
            content = json.loads((other / name).read_text())
            vocabulary = content["model"]["vocab"] if name == "tokenizer.json" else content
            first, second = list(vocabulary)[300:302]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            (other / name).write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"(?s)teacher's tokenizer \(.*llava-other.*is not the student's.*one model family"
    ):
        stage(teacher_model_path=other)


def test_taf_with_another_tower_is_refused(siglip, stage):
    with pytest.raises(
        ValueError, match="TAF fetches the teacher's adapter.*--vision_tower .*siglip.*is not the teacher's"
    ):
        stage(vision_tower=siglip, mm_projector_type="taf")
    with pytest.raises(ValueError, match=r"--vision_tower .*layer -1\) is not the teacher's .*layer -2"):
        stage(mm_vision_select_layer=-1, mm_projector_type="taf")


def test_towers_with_other_numbers_of_patches_cannot_be_aligned(stage, world, tmp_path):
    from factory import save_tower

    tower = save_tower(tmp_path / "siglip-small", patches=4, pixels=42)
    with pytest.raises(
        ValueError, match=r"\(9 and 4 an image\).*encoders with the same number of patches.*--vat False"
    ):
        stage(vision_tower=tower)
    assert stage(vision_tower=tower, vat=False).state.global_step == 2


def test_towers_of_other_image_sizes_are_refused(stage, tmp_path):
    from factory import save_tower

    tower = save_tower(tmp_path / "siglip-large")
    with pytest.raises(ValueError, match="take images of 42 and 56 pixels.*one of its image size"):
        stage(vision_tower=tower, vat=False)


def test_too_few_teacher_layers_is_refused(stage):
    with pytest.raises(
        ValueError, match=r"student band \[0, 1, 2, 3\] has 4 and the teacher band \[2, 3\] has 2.*'simple'"
    ):
        stage(student_layers="all", teacher_layers="2,3")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher_model_path": None},
            "--stage dft distils from a teacher: give --teacher_model_path, or use --stage sft",
        ),
        ({"vision_tower": None}, "--vision_tower is missing"),
        ({"data_path": None}, "--data_path is missing"),
        ({"taf_depth": 3}, "--taf_depth 3: MLP_S has 1 or 2 linear layers"),
        ({"kd_temperature": 0}, "--kd_temperature 0.0: must be greater than 0"),
        ({"kl_weight": -1}, "--kl_weight -1.0: a loss weight cannot be negative"),
        ({"student_layers": "middle"}, "--student_layers 'middle': .*intermediate"),
        ({"student_layers": "1;2"}, "--student_layers '1;2': a list of layers reads like 8,9,10"),
        ({"student_layers": "2,9"}, r"layers \[2, 9\] are outside a model with 4 layers"),
        ({"calibration_batches": 0}, "--calibration_batches 0"),
        ({"version": "qwen"}, "'qwen' is no conversation template .*Known: .*qwen_1_5"),
        ({"mm_projector_type": "taf", "name": "sft"}, "--mm_projector_type taf without a teacher needs"),
        ({"name": "dpt", "lora_enable": True}, "--stage dpt trains the adapter alone: --lora_enable"),
        (
            {"name": "dpt", "mm_use_im_start_end": True},
            "--mm_use_im_start_end True adds two tokens .* saves the adapter alone: .*would stay random",
        ),
        (
            {"lora_enable": True, "mm_use_im_start_end": True},
            "saves the adapter and LoRA weights: .*Leave the flag out",
        ),
    ],
)
def test_flags_that_cannot_be(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)
