"""`eval --check`: what is there of each benchmark, without a model."""

from __future__ import annotations

import json
import shutil

import pytest

from llava_compodistill.cli import main
from llava_compodistill.eval.benchmarks import get, registered
from llava_compodistill.eval.check import look
from miniature.benchmarks import write_benchmarks

pytestmark = pytest.mark.once  # nothing here depends on transformers


@pytest.fixture
def data(world, tmp_path):
    write_benchmarks(world["data"], tmp_path / "eval")
    return tmp_path / "eval"


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_everything_is_there(data, capsys):
    assert main(["eval", "--check", "--data-root", str(data)]) == 0
    text = printed(capsys)
    for benchmark in registered().values():
        assert f"{benchmark.title} complete" in text
    assert "server: an evaluation ends with a file" in text and "official:" not in text


def test_counts_are_those_of_the_files(data):
    for name in registered():
        found = look(get(name), data)
        assert found.state == "complete" and found.problem == "" and found.read
    lines = (data / "winoground" / "examples.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    found = look(get("winoground"), data)
    images = {entry[place] for entry in entries for place in ("image_0", "image_1")}
    assert (found.items, found.images, found.scored) == (len(lines), len(images), "here")
    asked = [json.loads(line) for line in (data / "pope" / "llava_pope_test.jsonl").read_text().splitlines()]
    found = look(get("pope"), data)
    assert (found.items, found.images) == (len(asked), len({entry["image"] for entry in asked}))
    assert found.read == (
        "pope/coco/coco_pope_adversarial.json", "pope/coco/coco_pope_popular.json",
        "pope/coco/coco_pope_random.json", "pope/llava_pope_test.jsonl",
    )  # fmt: skip
    assert look(get("vqav2"), data).scored == "server"
    (data / "gqa" / "data" / "testdev_balanced_questions.json").unlink()
    assert look(get("gqa"), data).scored == "official"


def test_what_is_missing_or_wrong_is_named_with_the_way_out(data, capsys):
    shutil.rmtree(data / "sade")
    labels = data / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text() + '{"label": "yes"}\n' * 3)  # one of POPE's later lists
    (data / "reefknot" / "VQA.jsonl").unlink()
    assert main(["eval", "--check", "--data-root", str(data)]) == 1
    text = printed(capsys)
    assert "SADE missing" in text and "POPE wrong" in text and "Reefknot missing" in text and "MME complete" in text
    assert (
        "`llava-compodistill sade` converts each" in text and "VQA.jsonl is missing: its files are at github" in text
    )
    assert "commit e3e3926 of github.com/AoiDragon/POPE (random has 2,910 there" in text
    assert main(["eval", "--check", "--data-root", str(data), "--benchmarks", "mme,winoground"]) == 0
    assert main(["eval", "--check", "--data-root", str(data), "--benchmarks", "mme,pope"]) == 1
    assert main(["eval", "--check", "--data-root", str(data / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_pope_s_later_lists_are_refused_before_anything_is_asked(data, tmp_path, capsys):
    """A model's folder is enough to find it out: nothing is loaded."""
    labels = data / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text() + '{"label": "yes"}\n')
    model = tmp_path / "llava-model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llava_qwen2"}')
    flags = ["eval", "--model-path", str(model), "--data-root", str(data), "--benchmarks", "pope"]
    assert main(flags) == 2
    assert "LLaVA's questions belong to the lists at commit e3e3926" in printed(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model-path is missing"),
        (
            ["--model-path", "x", "--judge", "y", "--benchmarks", "pope"],
            "--judge: none of pope has answers for a judge",
        ),
        (["--model-path", "x", "--judge", "y", "--benchmarks", "reefknot"], "--judge y: no folder or name of a model"),
    ],
)
def test_flags_that_lack_something(data, capsys, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", "--data-root", str(data), *flags]) == 2
    found = capsys.readouterr()
    assert message in " ".join((found.out + found.err).split())
