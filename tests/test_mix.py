"""Training data from several files: weights, folders, manifest, and what is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import tiny
from PIL import Image

from llava_compodistill.errors import CheckpointError, DataError
from llava_compodistill.train.mix import Mix, Source, read_sources


@pytest.fixture
def files(tmp_path):
    """Two files: six samples with an image each, and four of text alone."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "images" / "more" / "a.png")
    seen = [tiny.sample(number, "a.png", 1) for number in range(6)]
    text = [tiny.sample(number + 10, None, 2) for number in range(4)]
    (tmp_path / "seen.json").write_text(json.dumps(seen))
    (tmp_path / "text.json").write_text(json.dumps(text))
    return tmp_path


def mix(files, *sources, seed=0):
    return Mix(sources, str(files / "images"), "error", True, seed)


def ids(samples):
    return [sample["id"].split("-")[1] for sample in samples]


def test_one_file_is_itself(files):
    path = str(files / "text.json")
    assert read_sources(path) == [Source(path)]
    assert list(mix(files, *read_sources(path))) == json.loads((files / "text.json").read_text())


def test_a_name_with_a_comma_is_one_file(files):
    path = files / "a,b.json"
    path.write_text((files / "text.json").read_text())
    assert read_sources(str(path)) == [Source(str(path))]


def test_several_files_and_folders(files):
    path = files / "mix.yaml"
    path.write_text(
        "datasets:\n  - path: seen.json\n    image_folder: more\n    weight: 1.5\n  - text.json\n", encoding="utf-8"
    )
    sources = read_sources(str(path))
    assert sources == [Source(str(files / "seen.json"), 1.5, "more"), Source(str(files / "text.json"))]
    samples = mix(files, *sources)
    assert len(samples) == 9 + 4 and sum(samples.with_image) == 9
    assert samples[0]["image"] == "more/a.png" and "image" not in samples[12]
    numbers = ids(samples)
    assert all(numbers.count(str(number)) in (1, 2) for number in range(6)) and numbers[9:] == ["10", "11", "12", "13"]
    assert list(samples.words) == [sum(len(t["value"].split()) for t in s["conversations"]) for s in samples]
    listed = read_sources(f"{files / 'seen.json'}, {files / 'text.json'}")
    assert [source.path for source in listed] == [source.path for source in sources]


def test_a_share_is_drawn_by_the_seed(files):
    half = Source(str(files / "text.json"), 0.5)
    drawn = [ids(mix(files, half, seed=seed)) for seed in range(8)]
    assert all(len(found) == 2 for found in drawn) and len({tuple(found) for found in drawn}) > 1
    assert ids(mix(files, half, seed=3)) == drawn[3]
    assert ids(mix(files, Source(str(files / "text.json"), 2))) == sorted(["10", "11", "12", "13"] * 2)


def test_the_manifest_goes_into_every_checkpoint(files, world, tmp_path):
    path = files / "mix.yaml"
    path.write_text("datasets:\n  - {path: seen.json, image_folder: more, weight: 0.5}\n  - text.json\n")
    options = {"data_path": path, "image_folder": files / "images", "mm_projector_type": "mlp2x_gelu", "seed": 7}
    out = tmp_path / "out"
    tiny.run(world, "sft", out, **options, save_strategy="steps", save_steps=1)
    manifest = json.loads((out / "data_manifest.json").read_text())
    assert json.loads((out / "checkpoint-1" / "data_manifest.json").read_text()) == manifest
    assert manifest["samples"] == 3 + 4 and manifest["with_image"] == 3 and manifest["seed"] == 7
    first = manifest["files"][0]
    assert first["sha256"] == hashlib.sha256((files / "seen.json").read_bytes()).hexdigest()
    assert (first["samples"], first["used"], first["weight"], first["image_folder"]) == (6, 3, 0.5, "more")
    # Another weight is another run.
    path.write_text(path.read_text().replace("0.5", "0.75"))
    with pytest.raises(CheckpointError, match="data_files"):
        tiny.run(world, "sft", out, **options, save_strategy="steps", save_steps=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("datasets: [", "not valid YAML"),
        ("- seen.json", "must hold a list `datasets`"),
        ("datasets: []", "must hold a list `datasets`"),
        ("datasets: [{weight: 1}]", "entry 1: must be a path, or have one"),
        ("datasets: [{path: seen.json, wieght: 1}]", "entry 1: unknown wieght; there are path, weight, image_folder"),
        ("datasets: [text.json, {path: seen.json, weight: 0}]", "entry 2: weight must be a number above 0, got 0"),
        ('datasets: ["\\0.json"]', r"mix\.yaml: .*x00\.json' is no name that a file can have"),
        ('datasets: [{path: "a\\ud800.json"}]', r"mix\.yaml: .* is no name that a file can have"),
        ("datasets: [{path: seen.json, weight: x}]", "weight must be a number above 0, got 'x'"),
        ("datasets: [{path: seen.json, image_folder: 3}]", "image_folder must be a text, got 3"),
        ("datasets: [seen.json, ./seen.json]", "stands there twice"),
    ],
)
def test_a_wrong_mix_is_named(files, text, message):
    path = files / "mix.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_sources(str(path))


def test_missing_files_are_named(files):
    with pytest.raises(DataError, match="none.yaml: there is no such file"):
        read_sources(str(files / "none.yaml"))
    with pytest.raises(DataError, match="nothing between two of the commas"):
        read_sources("a.json,,b.json")
    with pytest.raises(DataError, match="none.json: there is no such file"):
        mix(files, *read_sources(f"{files / 'text.json'},{files / 'none.json'}"))
    with pytest.raises(DataError, match=r"a weight of 0\.1 leaves no sample of .*text\.json"):
        mix(files, Source(str(files / "text.json"), 0.1))
    with pytest.raises(DataError, match=r"a weight of 1e\+30 makes more than 100,000,000 samples of .*text\.json"):
        mix(files, Source(str(files / "text.json"), 1e30))
