"""Bad input: a clear error before training, or, asked to skip, a log entry and training on the rest."""

from __future__ import annotations

import json
import logging
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from factory import save_tower
from PIL import Image
from test_records import GPT, HUMAN, TEXT, record, save_images
from transformers import AutoTokenizer

from llava_compodistill.errors import DataError
from llava_compodistill.train.data import CheckedDataset


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path / "images")


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
    with pytest.raises(DataError, match=r"\.json: sample 'the one' \(image 'broken\.png'\): .*[^.]\. --bad_samples"):
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
    with pytest.raises(DataError, match=rf"sample 'the one' .*cannot be read as an image \({type(error).__name__}"):
        data[1]
    assert skipping[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()


def test_a_decompression_bomb_is_a_bad_sample(world, images, tmp_path, monkeypatch):
    data = dataset(world, images, tmp_path, [record(..., turns=[TEXT, GPT]), record(id="bomb")], "skip")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert data[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()
    data.data_args.bad_samples = "error"
    with pytest.raises(DataError, match="'bomb'.*could be decompression bomb"):
        data[1]


def test_an_image_too_large_when_padded_is_a_bad_sample(world, images, tmp_path, monkeypatch):
    Image.new("RGB", (200, 10)).save(images / "thin.png")
    records = [record("b.png"), record("thin.png", id="thin")]
    data = dataset(world, images, tmp_path, records, image_aspect_ratio="pad")
    assert data[1]["image"].shape == (3, 56, 56)
    monkeypatch.setenv("COMPODISTILL_MAX_MEGAPIXELS", "0.01")
    with pytest.raises(DataError, match=r"sample 'thin' \(image 'thin\.png'\): .*200 x 10 pixels, padded to a square"):
        data[1]
    data.data_args.bad_samples = "skip"
    assert data[1]["input_ids"].tolist() == data[0]["input_ids"].tolist()
    monkeypatch.setenv("COMPODISTILL_MAX_MEGAPIXELS", "none")
    with pytest.raises(DataError, match="COMPODISTILL_MAX_MEGAPIXELS=none: must be a number"):
        dataset(world, images, tmp_path, records, "skip")


def test_images_outside_the_folder_are_a_flag(world, images, tmp_path):
    (images / "a.png").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="outside --image_folder"):
        dataset(world, images, tmp_path, [record("../a.png")])
    data = dataset(world, images, tmp_path, [record("../a.png")], allow_outside_images=True)
    assert data[0]["image"].shape == (3, 56, 56)


def test_pixels_that_are_not_numbers_name_the_sample(world, images, tmp_path, monkeypatch):
    """As a processor with a standard deviation of 0 gives them."""
    data = dataset(world, images, tmp_path, [record("b.png"), record(id="the one")])
    assert bool(torch.isfinite(data[1]["image"]).all())
    monkeypatch.setattr(data.data_args.image_processor, "image_std", [0.0, 0.0, 0.0])
    with pytest.raises(DataError, match="sample 'the one' .*pixels are NaN or infinite"):
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
    def run(name="dft", output="out", **changes):
        values = {"teacher_model_path": teacher_path, "mm_projector_type": "mlp2x_gelu", **changes}
        output = tmp_path / output
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


def test_tokenizers_with_one_token_apart_are_unlike(stage, teacher_path, tmp_path, caplog):
    other = tmp_path / "llava-other"
    shutil.copytree(teacher_path, other)
    for name in ("tokenizer.json", "vocab.json"):  # transformers 5 and 4
        if (other / name).is_file():
            content = json.loads((other / name).read_text())
            vocabulary = content["model"]["vocab"] if name == "tokenizer.json" else content
            first, second = list(vocabulary)[300:302]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            (other / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="terms that compare tokens of text one by one: features"):
        stage(teacher_model_path=other, method="llavadi")
    trainer = stage(teacher_model_path=other)
    assert {"lm", "uld", "attention"} <= trainer.state.log_history[0].keys()
    assert re.search(
        r"teacher's tokenizer \(.*llava-other.*is not the student's.*: '.*' is \d+ and \d+\.", caplog.text
    )


def test_taf_with_another_tower_is_refused(siglip, stage):
    with pytest.raises(
        ValueError, match="TAF fetches the teacher's adapter.*--vision_tower .*siglip.*is not the teacher's"
    ):
        stage(vision_tower=siglip, mm_projector_type="taf")
    with pytest.raises(ValueError, match=r"--vision_tower .*layer -1\) is not the teacher's .*layer -2"):
        stage(mm_vision_select_layer=-1, mm_projector_type="taf")


@pytest.mark.parametrize("patches, pixels", [(4, 42), (16, 56)])
def test_towers_of_other_sizes_are_aligned(stage, tmp_path, caplog, patches, pixels):
    """The teacher's tower cuts 42 pixels into 9 patches."""
    tower = save_tower(tmp_path / "siglip-other", patches=patches, pixels=pixels)
    trainer = stage(vision_tower=tower)
    assert all(0 < entry["attention"] < 1 for entry in trainer.state.log_history if "attention" in entry)
    assert f"maps are resampled from 9 to {patches} patches an image" in caplog.text
    assert (f"resized from {pixels} to 42 pixels" in caplog.text) == (pixels != 42)
    assert stage(vision_tower=tower, output="without", vat=False).state.global_step == 2
    for options in ({"attention_heads": "matched"}, {"layer_matching": "adaptive"}):
        log = stage(vision_tower=tower, output=next(iter(options)), **options).state.log_history
        assert all(0 < entry["attention"] < 1 for entry in log if "attention" in entry)


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
        ({"fp16": True}, "(?i)fp16.* (on a CPU|can only be used)"),
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
