"""`llava-compodistill check`: each finding by a small case, and agreement with what training does."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from factory import save_tower
from PIL import Image
from rich.console import Console
from test_data import dataset
from test_records import BAD, GPT, HUMAN, TEXT, record, save_images

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.hosts.llava.training import DataCollatorForSupervisedDataset
from llava_compodistill.train.facts import BatchFacts
from llava_compodistill.train.image_files import ImageFiles
from llava_compodistill.train.preflight import images as image_checks
from llava_compodistill.train.preflight import pair, processes
from llava_compodistill.train.preflight.check import EXIT, Check, Options
from llava_compodistill.train.preflight.findings import NOTE, SKIPS, STOPS
from llava_compodistill.train.preflight.flags import OF_THE_MACHINE, take_out, without_launcher
from llava_compodistill.train.preflight.lengths import Limits, Reader, chosen_places
from llava_compodistill.train.skip_list import read_skip_list

ROOT = Path(__file__).resolve().parents[1]

LONG = {**GPT, "value": "red square above a blue circle " * 40}


@pytest.fixture
def folder(tmp_path):
    save_images(tmp_path / "images")
    return tmp_path


def write(folder, records, name="data.json"):
    (folder / name).write_text(json.dumps(records))
    return folder / name


def files_alone(folder, data, *more):
    return ["--data_path", str(data), "--image_folder", str(folder / "images"), *more]


def whole(world, folder, data, **changes):
    """A command line of SFT on these data."""
    values = {
        "data_path": data,
        "image_folder": folder / "images",
        "mm_projector_type": "mlp2x_gelu",
        **changes,
    }
    return tiny.flags(world, values.pop("stage", "sft"), folder / "out", **values)


def check(flags, **options):
    options.setdefault("workers", 1)
    return Check(flags, Options(**options), Console(file=open(os.devnull, "w"))).run()  # noqa: SIM115


def found(report, level, beginning):
    """The one finding of a level whose kind begins so."""
    kinds = [finding for finding in report.findings if finding.level == level and finding.kind.startswith(beginning)]
    assert len(kinds) == 1, [(finding.level, finding.kind, finding.examples) for finding in report.findings]
    return kinds[0]


def levels(report):
    return {finding.level for finding in report.findings}


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
#: As in test_records, and those that only show when they are read.
READ = {
    "several rounds": (record(turns=[HUMAN, GPT, TEXT, GPT]), None),
    "text alone": (record(..., turns=[TEXT, GPT]), None),
    "an answer first": (record(turns=[GPT, HUMAN, GPT]), None),
    "an empty answer": (record(turns=[HUMAN, {**GPT, "value": ""}]), None),
    "a damaged image": (record("broken.png"), "the image cannot be decoded"),
}


@pytest.mark.parametrize("version", ["qwen_1_5", "plain", "v1"])
def test_check_and_data_set_agree_on_every_sample(world, folder, version):
    """What check passes the data set yields, what it refuses the data set refuses."""
    cases = [entry for entry, _ in [*BAD.values(), *READ.values()]] + [record("b.png")]
    report = check(whole(world, folder, write(folder, cases), version=version), images=True, measured=None)
    refused = set(report.findings.unwanted.get(str(folder / "data.json"), {}))
    for index, entry in enumerate(cases):
        try:
            sample = dataset(world, folder / "images", folder, [entry], version=version)[0]
            assert bool((sample["labels"] != -100).any()) and index not in refused, (entry, refused)
        except DataError:
            assert index in refused, entry
    if version == "v1":  # no label is left under any template that does not fit the tokenizer
        assert refused == set(range(len(cases))) and found(report, SKIPS, "no label is left").remedy.startswith("give")
    assert report.skipped == len(refused) and report.verdict == "ready with samples skipped"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_named(folder, case):
    bad, message = BAD[case]
    data = write(folder, [record(), bad, bad, bad, bad, record("b.png")])
    report = check(files_alone(folder, data))
    (finding,) = report.findings
    assert (finding.level, finding.count, len(finding.examples)) == (SKIPS, 4, 3) and finding.remedy
    first = finding.examples[0]
    assert (first.file, first.index) == (str(data), 1)
    assert first.id == (bad.get("id", 1) if isinstance(bad, dict) else 1)
    kind, _, _ = message.partition(":")
    assert finding.kind.startswith(kind.split(r" .*")[0])
    assert report.counts["usable"] == 2 and report.skipped == 4


def test_an_empty_answer_is_noted(folder):
    report = check(files_alone(folder, write(folder, [record(turns=[HUMAN, {**GPT, "value": " "}])])))
    assert report.verdict == "ready" and found(report, NOTE, "an empty answer").examples[0].index == 0


def test_images_outside_their_folder(folder, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    data = write(folder, [record(), record(str(outside)), record("../outside.png")])
    assert found(check(files_alone(folder, data)), SKIPS, "an image outside --image_folder").count == 2
    assert check(files_alone(folder, data, "--allow_outside_images", "True")).verdict == "ready"


def test_files_of_every_kind(folder):
    write(folder, [record(), record("none.png", id="first")], "a.json")
    lines = [json.dumps(entry) for entry in (record("b.png"), record("none.png", id="second"))]
    (folder / "b.jsonl").write_text("\n\n".join(lines) + "\n")
    mix = folder / "mix.yaml"
    mix.write_text("datasets:\n  - path: a.json\n    weight: 2\n  - path: b.jsonl\n")
    report = check(files_alone(folder, mix))
    missing = found(report, SKIPS, "missing image")
    assert [example.id for example in missing.examples] == ["first", "second"]
    assert [os.path.basename(example.file) for example in missing.examples] == ["a.json", "b.jsonl"]
    assert (report.counts["files"], report.counts["usable"], report.counts["in_an_epoch"]) == (2, 2, 3)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("bad.json", '[{"id": 1}\n{"id": 2}]', "line 2: not valid JSON"),
        ("bad.jsonl", '{"id": 1}\n{"id": 2', "line 2: not valid JSON"),
        ("bad.jsonl", "\n", "must hold at least one sample"),
        ("bad.yaml", "datasets: []", "must hold a list `datasets`"),
        ("none.yaml", None, "there is no such file"),
        ("none.json", None, "there is no such file"),
        ("bad.json", json.dumps([record("none.png")]), "no usable sample is left"),
    ],
)
def test_files_that_training_cannot_read(folder, name, text, message):
    if text is not None:
        (folder / name).write_text(text)
    report = check(files_alone(folder, folder / name))
    assert report.verdict == "cannot train"
    assert message in found(report, STOPS, "a data file that cannot be used").examples[0].detail


def test_pairs_of_answers(world, folder, teacher_path):
    good = record(rejected="Blue")
    flags = {"method": "llava_mod", "stage": "preference", "teacher_model_path": teacher_path}
    data = write(folder, [good, record(), record(rejected="Red")])
    report = check(whole(world, folder, data, **flags), without_weights=True)
    assert (
        found(report, SKIPS, "no rejected answer").count == found(report, SKIPS, "the rejected answer is").count == 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_base", "plain"])
@pytest.mark.parametrize("limit", [20, 60, 300])
def test_lengths_are_those_of_the_batches(world, folder, version, limit):
    records = [record(), record("b.png", turns=[HUMAN, LONG])]
    if version != "plain":
        records += [record(..., turns=[TEXT, GPT, TEXT, LONG]), record(turns=[HUMAN, LONG, TEXT, GPT])]
    data = dataset(world, folder / "images", folder, records, version=version)
    collate = DataCollatorForSupervisedDataset(tokenizer=data.tokenizer)
    from llava_compodistill.hosts.llava.templates import use_template

    reader = Reader(data, Limits(9, limit), use_template(version))
    readings = reader.read(range(len(records)))
    assert readings == [reader.read_one(place) for place in range(len(records))]
    for place, reading in enumerate(readings):
        batch = collate([data[place]])
        facts = BatchFacts.of({**batch, "images": batch["images"]}, 9, limit)
        assert reading.left == facts.answer_tokens and (not reading.left) == bool(facts.cut)
        ids = data[place]["input_ids"]
        assert reading.length == len(ids) + 8 * int((ids == -200).sum())
        assert reading.answers == int((data[place]["labels"] != -100).sum())


def test_texts_are_tokenized_together_where_that_is_the_same(world, folder, monkeypatch):
    data = dataset(world, folder / "images", folder, [record(), record(..., turns=[TEXT, GPT])])
    if not data.tokenizer.is_fast:
        pytest.skip("transformers 4.37 gives LLaVA a slow tokenizer")
    from llava_compodistill.hosts.llava.templates import use_template

    reader = Reader(data, Limits(9, 512), use_template("qwen_1_5"))
    calls = []
    monkeypatch.setattr(
        "llava_compodistill.train.preflight.lengths.Reader.read_one", lambda self, place: calls.append(place)
    )
    assert all(reading.answers for reading in reader.read([0, 1])) and calls == []


def test_samples_longer_than_a_pack_are_named(world, folder):
    data = write(folder, [record(), record(turns=[HUMAN, LONG], id="long")])
    report = check(whole(world, folder, data, pack_length=100))
    (example,) = found(report, NOTE, "longer than --pack_length 100").examples
    assert example.id == "long" and report.verdict == "ready"


def test_what_the_limit_cuts(world, folder):
    late = {**HUMAN, "value": LONG["value"] + "<image>"}
    records = [record(), record(turns=[HUMAN, LONG], id="cut"), record(turns=[late, GPT], id="lost")]
    report = check(whole(world, folder, write(folder, records), model_max_length=100))
    assert report.verdict == "ready" and (report.lengths.cut, report.lengths.lost) == (2, 1)
    assert found(report, NOTE, "cut at --model_max_length").examples[0].id == "cut"
    assert found(report, NOTE, "no answer left within --model_max_length").examples[0].id == "lost"
    values = report.lengths.as_json()
    assert values["measured"] == 3 and values["visual_tokens"] == {"9": 3} and values["percentiles"]["100"] > 100
    assert sum(count for _, _, count in values["histogram"]) == 3 and values["histogram"][-1][2] == 2
    # With a limit that holds all of them nothing is found of the samples.
    report = check(whole(world, folder, write(folder, records), model_max_length=2048))
    assert [finding.kind for finding in report.findings] == ["an adapter that starts from random weights"]
    assert (report.lengths.cut, report.lengths.lost) == (0, 0)


def test_a_share_of_the_samples_is_measured_and_that_is_said(world, folder):
    assert chosen_places(10, 4) == [0, 2, 5, 7] and chosen_places(3, 4) == chosen_places(3, None) == [0, 1, 2]
    report = check(whole(world, folder, write(folder, [record()] * 10)), measured=4)
    assert len(report.lengths.lengths) == 4 and any("--lengths all" in text for text in report.unchecked)
    report = check(whole(world, folder, write(folder, [record()] * 10)), measured=None)
    assert len(report.lengths.lengths) == 10 and not any("--lengths" in text for text in report.unchecked)


def test_several_processes_find_the_same(world, folder, monkeypatch):
    monkeypatch.setattr("llava_compodistill.train.preflight.lengths._CHUNK", 3)
    monkeypatch.setattr(image_checks, "_CHUNK", 1)
    records = [record("b.png", turns=[HUMAN, LONG] if number % 3 else [HUMAN, GPT]) for number in range(8)]
    flags = whole(world, folder, write(folder, [*records, record("broken.png")]), model_max_length=100)
    one, two = (check(flags, images=True, workers=workers).as_json() for workers in (1, 2))
    one.pop("seconds"), two.pop("seconds")
    assert one == two and one["lengths"]["cut"] == 5 and one["images"]["damaged"] == 1


def die(shared, chunk):
    os._exit(9)


def test_a_process_that_is_killed():
    with pytest.raises(DataError, match="was killed.*--workers"):
        list(processes.in_processes(die, None, [[1], [2]], 2, lambda n: None))


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------
def test_what_images_are(folder, monkeypatch):
    images = folder / "images"
    Image.new("I;16", (8, 8)).save(images / "deep.png")
    Image.new("F", (8, 8)).save(images / "float.tiff")
    Image.new("CMYK", (8, 8)).save(images / "ink.jpg")
    Image.new("RGBA", (8, 8)).save(images / "alpha.png")
    Image.new("P", (8, 8)).save(images / "palette.png", transparency=0)
    Image.new("L", (8, 30)).save(images / "grey.png")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    names = ["a.png", "deep.png", "float.tiff", "ink.jpg", "alpha.png", "palette.png", "grey.png", "cut.png"]
    records = [record(name, id=name) for name in [*names, "broken.png", "broken.png"]]
    report = check(files_alone(folder, write(folder, records), "--image_aspect_ratio", "pad"), images=True)
    damaged = found(report, SKIPS, "the image cannot be decoded")
    assert damaged.count == report.skipped == 3 and {e.id for e in damaged.examples} == {"cut.png", "broken.png"}
    kinds = {finding.kind: [example.id for example in finding.examples] for finding in report.findings}
    assert kinds["an image with 16 bits a channel"] == ["deep.png"]
    assert kinds["an image with floating point"] == ["float.tiff"]
    assert kinds["an image with CMYK"] == ["ink.jpg"]
    assert kinds["an image with an alpha channel"] == ["alpha.png", "palette.png"]
    assert len(kinds) == 5
    values = report.as_json()["images"]
    assert values["formats"] == {"PNG": 5, "TIFF": 1, "JPEG": 1} and values["height"]["most"] == 56
    assert (values["decoded"], values["damaged"], values["modes"]["RGB"]) == (7, 2, 1)

    monkeypatch.setattr(image_checks, "LARGE_SQUARE", 500)
    report = check(
        files_alone(folder, write(folder, [record("grey.png")]), "--image_aspect_ratio", "pad"), images=True
    )
    assert "8 x 30, 0 megapixels" in found(report, NOTE, "an image that is padded to a very").examples[0].detail
    assert list(check(files_alone(folder, folder / "data.json"), images=True).findings) == [], "not padded"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    report = check(files_alone(folder, folder / "data.json"), images=True)
    assert found(report, NOTE, "an image that Pillow takes for a decompression bomb").count == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    report = check(files_alone(folder, folder / "data.json"), images=True)
    assert "COMPODISTILL_MAX_MEGAPIXELS" in found(report, SKIPS, "the image cannot be decoded").examples[0].detail


def test_folders_are_listed_once(tmp_path, monkeypatch):
    for number in range(100):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "1.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    asked, original = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or original(path))
    files = ImageFiles()
    assert all(files.exists(str(tmp_path / f"{number}.png")) for number in range(100)) and len(asked) <= 32
    names = ["link.png", "folder.png", "broken.png", "none.png"]
    assert [files.exists(str(tmp_path / name)) for name in names] == [True, False, False, False]
    before = len(asked)
    assert not files.exists(str(tmp_path / "none.png")) and len(asked) == before
    assert not any(files.exists(str(tmp_path / "nowhere" / f"{number}.png")) for number in range(40))


# ---------------------------------------------------------------------------------------------------------------------
# Leaving samples out
# ---------------------------------------------------------------------------------------------------------------------
def test_the_printed_command_trains_without_the_bad_samples(world, folder, capsys):
    records = [record(id=str(number)) for number in range(6)]
    records[1] = record("none.png", id="missing")
    records[3] = record("broken.png", id="damaged")
    records[4] = record(turns=[{**HUMAN, "value": LONG["value"] * 3 + "<image>"}, GPT], id="lost")
    data, listed = write(folder, records), folder / "skip.json"
    flags = whole(world, folder, data)
    assert main(["check", *flags, "--images", "--workers", "1", "--write_skip", str(listed)]) == 1
    text = capsys.readouterr().out
    assert "ready with 2 samples skipped" in text and "lists 3 samples" in text
    command = next(line.strip() for line in text.splitlines() if line.startswith("  llava-compodistill train"))
    skip = json.loads(listed.read_text())["files"][0]["skip"]
    assert [(entry["index"], entry["why"].partition(": ")[0]) for entry in skip] == [
        (1, "missing image"),
        (3, "the image cannot be decoded"),
        (4, "no answer left within --model_max_length"),
    ]
    words = shlex.split(command)
    assert words[:2] == ["llava-compodistill", "train"] and words[-2:] == ["--skip_samples", str(listed)]
    assert main(["check", *words[2:], "--images", "--workers", "1"]) == 0
    assert "Verdict: ready." in capsys.readouterr().out

    from llava_compodistill.train.run import main as train

    with pytest.raises(DataError, match="1 of 6 samples cannot be used"):
        train(flags)
    trainer = train(words[2:])
    kept = [entry["id"] for entry in trainer.train_dataset.list_data_dict]
    assert kept == ["0", "2", "5"] and trainer.state.global_step == 2


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_the_command_of_a_script_can_be_pasted(launcher, world):
    settings = {"GPUS": "1", "HAS_BF16": "0", "HAS_TF32": "0", "HAS_DEEPSPEED": "0", "LAUNCHER": launcher}
    settings |= {"DRY_RUN": "1", "PYTHON": sys.executable, "STUDENT": str(world["qwen-student"])}
    scripts = Path(__file__).parents[1] / "scripts"

    def printed(script):
        done = subprocess.run(
            ["bash", str(scripts / script)], capture_output=True, text=True, env={**os.environ, **settings}
        )
        return done.stdout.split()

    flags = without_launcher(printed("dft.sh"))
    assert all(flag.startswith("--") for flag in flags[:1]) and flags[flags.index("--stage") + 1] == "dft"
    assert ("--deepspeed" in flags) == (launcher == "deepspeed") and "llava_compodistill.train" not in flags
    with pytest.raises(DataError, match="more than one training command.*ONLY"):
        without_launcher(printed("baseline_sft.sh"))


def test_without_a_list_the_command_skips(folder):
    report = check(["python", "-m", "llava_compodistill.train", *files_alone(folder, write(folder, [record(), {}]))])
    assert report.command == shlex.join(
        ["llava-compodistill", "train", *files_alone(folder, folder / "data.json"), "--bad_samples", "skip"]
    )
    assert check(files_alone(folder, write(folder, [record()]))).command is None


def test_a_list_for_other_data_is_refused(world, folder):
    data, listed = write(folder, [record(), record("none.png"), record("b.png")]), folder / "skip.json"
    check(files_alone(folder, data), write_skip=str(listed))
    flags = files_alone(folder, data, "--skip_samples", str(listed))
    assert check(flags).verdict == "ready" and check(flags).counts["left_out_by_list"] == 1
    again = folder / "again.json"
    assert check(flags, write_skip=str(again)).verdict == "ready"
    assert read_skip_list(str(again), [str(data)]) == read_skip_list(str(listed), [str(data)])
    moved = folder / "moved" / "data.json"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    assert check(files_alone(folder, moved, "--skip_samples", str(listed))).verdict == "ready", "found by its name"
    for records in ([record("b.png"), record(id="y"), record("none.png")], [record()]):
        write(folder, records)
        report = check(flags)
        detail = found(report, STOPS, "a data file that cannot be used").examples[0].detail
        assert "--skip_samples" in detail and "check --write_skip again" in detail
    with pytest.raises(DataError, match="none of the files of --data_path"):
        read_skip_list(str(listed), [str(folder / "other.json")])
    listed.write_text('{"files": [{"path": 1}]}')
    with pytest.raises(DataError, match=r"skip\.json: not a list that llava-compodistill check"):
        read_skip_list(str(listed), [str(data)])
    listed.write_text(json.dumps({"files": [{"path": str(data), "skip": [{"index": 1, "checksum": 1e999}]}]}))
    with pytest.raises(DataError, match=r"--skip_samples .*skip\.json"):
        read_skip_list(str(listed), [str(data)])
    same = [{"path": f"{folder}/{name}/data.json", "skip": []} for name in ("gone", "lost")]
    listed.write_text(json.dumps({"files": same}))
    with pytest.raises(DataError, match="two of its files could be"):
        read_skip_list(str(listed), [str(data)])
    with pytest.raises(DataError, match=r"--skip_samples .*none\.json: there is no such file"):
        read_skip_list(str(folder / "none.json"), [str(data)])


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def distil(world, folder, teacher_path):
    """A check of a DFT on one sample."""

    def run(teacher_model_path=teacher_path, without_weights=False, **changes):
        data = write(folder, [record()])
        values = {"stage": "dft", "teacher_model_path": teacher_model_path, "model_max_length": 512, **changes}
        return check(whole(world, folder, data, **values), without_weights=without_weights)

    return run


def row(report, name):
    return next(row[1:] for row in report.models.rows if row[0] == name)


def test_a_pair_that_fits(distil, dpt_path):
    report = distil(mm_projector_type="taf", pretrain_mm_mlp_adapter=dpt_path / "mm_projector.bin")
    assert list(report.findings) == [] and EXIT[report.verdict] == 0
    assert row(report, "checkpoint") == ("base", "full", "usual in dft: base")
    assert row(report, "tokenizer")[2].startswith("shared") and "encoded once" in row(report, "vision tower")[2]
    assert row(report, "visual tokens an image")[:2] == ("9", "9")
    assert row(report, "adapter")[:2] == ("taf", "mlp2x_gelu")
    assert report.models.aligned_layers() == [
        {"term": "attention", "student": [2], "groups": [[2, 3, 4]], "measured": ""}
    ]
    report = distil(student_layers="sight", teacher_layers="sight")
    assert "--student_layers sight" in report.models.aligned_layers()[0]["measured"]


@pytest.mark.parametrize(
    "flags, missing",
    [
        ({"teacher_placement": "fsdp"}, None),
        ({"teacher_placement": "zero3", "deepspeed": ROOT / "scripts" / "zero2.json"}, None),
        ({"teacher_placement": "4bit"}, "--teacher_placement 4bit"),
        ({"bits": 4, "lora_enable": True}, "--bits 4"),
    ],
    ids=str,
)
def test_what_only_the_machine_that_trains_can_have(distil, flags, missing):
    """Several processes and GPUs are not asked for here; a package is named as what it is."""
    if missing and importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    report = distil(**flags)
    stopped = [finding for finding in report.findings if finding.level == STOPS]
    if missing is None:
        assert not stopped
    else:
        assert [finding.kind for finding in stopped] == ["a package is missing"]
        assert stopped[0].examples[0].detail == f"bitsandbytes, for {missing}"


def test_quantised_weights_do_not_go_with_zero3(distil):
    report = distil(bits=4, lora_enable=True, deepspeed=ROOT / "scripts" / "zero3.json")
    assert "ZeRO-3 cannot partition quantised weights" in found(report, STOPS, "the flags").examples[0].detail


def test_dashes_are_taken_for_underscores():
    flags = ["--output-dir", "out", "--deepspeed=x.json", "--fsdp-config", "y.json", "--fsdp", "full_shard"]
    rest, held = take_out(flags, OF_THE_MACHINE)
    assert rest == ["--output-dir", "out"] and held["deepspeed"] == "x.json"
    assert held.keys() <= set(OF_THE_MACHINE) and {"fsdp", "fsdp_config"} & set(OF_THE_MACHINE) <= held.keys()


def test_the_papers_pair_from_configs_alone(world, folder):
    """Qwen1.5-1.8B from LLaVA-Qwen1.5-4B, with SigLIP so400m at 384 pixels: no weights anywhere."""
    common = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    student = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
    teacher = {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 20}
    tower = {
        "model_type": "siglip",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
    multimodal = {
        "model_type": "llava_qwen2",
        "mm_vision_tower": str(folder / "siglip"),
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1152,
    }
    configs = {
        "student": {**common, **student, "num_key_value_heads": 16},
        "teacher": {**common, **teacher, "num_key_value_heads": 20, **multimodal},
        "siglip": tower,
    }
    for name, values in configs.items():
        if name == "siglip":
            (folder / name).mkdir()
        else:
            shutil.copytree(world["tokenizer"], folder / name)
        (folder / name / "config.json").write_text(json.dumps(values))
    data = write(folder, [record()])
    flags = whole(
        world,
        folder,
        data,
        stage="dft",
        model_name_or_path=folder / "student",
        teacher_model_path=folder / "teacher",
        vision_tower=folder / "siglip",
        mm_projector_type="taf",
        model_max_length=2048,
    )
    report = check(flags)
    weights = found(report, STOPS, "weights")
    assert report.verdict == "cannot train" and weights.count == 3 and "not here" in weights.examples[0].detail
    report = check(flags, without_weights=True)
    assert report.verdict == "ready" and levels(report) == {NOTE}
    (aligned,) = report.models.aligned_layers()
    assert aligned["student"] == list(range(8, 17)) and aligned["groups"] == [
        list(range(k, k + 8)) for k in range(12, 21)
    ]
    assert (
        row(report, "visual tokens an image")[:2] == ("729", "729")
        and row(report, "vocabulary (config)")[0] == "151936"
    )
    assert report.lengths.lengths[0] > 729


def test_tokenizers_apart(distil, folder, teacher_path):
    other = folder / "llava-other"
    shutil.copytree(teacher_path, other)
    for name in ("tokenizer.json", "vocab.json"):
        if (other / name).is_file():
            content = json.loads((other / name).read_text())
            vocabulary = content["model"]["vocab"] if name == "tokenizer.json" else content
            first, second = list(vocabulary)[300:302]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            (other / name).write_text(json.dumps(content))
    report = distil(other)
    assert report.verdict == "ready" and row(report, "tokenizer")[2].startswith("unlike (the first token apart: ")
    report = distil(other, method="llavadi")
    assert "terms that compare tokens of text one by one" in found(report, STOPS, "the pair").examples[0].detail


def test_towers_apart(distil, folder):
    tower = save_tower(folder / "siglip-other", patches=4)
    report = distil(vision_tower=tower)
    assert "maps are resampled from 9 to 4" in row(report, "vision tower")[2] and report.verdict == "ready"
    report = distil(vision_tower=tower, mm_projector_type="taf")
    assert "TAF fetches the teacher's adapter" in found(report, STOPS, "the pair").examples[0].detail


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"version": "qwen"}, "the template", "'qwen' is no conversation template"),
        ({"student_layers": "all", "teacher_layers": "2,3"}, "the pair", "the strategy 'simple'"),
        ({"student_layers": "2,9"}, "the pair", "outside a model with 4 layers"),
        ({"kd_temperature": 0}, "the flags", "must be greater than 0"),
        ({"teacher_model_path": None}, "the flags", "give --teacher_model_path"),
        ({"no_such_flag": 1}, "the flags", "no_such_flag"),
        ({"teacher_model_path": "./nowhere"}, "no such folder", "the teacher, ./nowhere"),
        ({"model_name_or_path": "./nowhere"}, "no such folder", "the student, ./nowhere"),
        ({"vision_tower": "./nowhere"}, "the student", "nowhere"),
        ({"pretrain_mm_mlp_adapter": "./nowhere.bin"}, "no such file", "--pretrain_mm_mlp_adapter ./nowhere.bin"),
        ({"pretrain_mm_mlp_adapter": "."}, "the adapter", "is a folder: name the mm_projector.bin"),
        (
            {"attn_implementation": "flash_attention_2"},
            "a package is missing",
            "flash_attn, for --attn_implementation",
        ),
        ({"deepspeed": "./nowhere.json"}, "no such file", "--deepspeed ./nowhere.json"),
        ({"skip_samples": "./nowhere.json"}, "a data file that cannot be used", "--skip_samples ./nowhere.json"),
    ],
    ids=str,
)
def test_what_training_would_refuse(distil, changes, kind, message, monkeypatch):
    if "flash" in str(changes):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = distil(**changes)
    assert report.verdict == "cannot train"
    assert message in found(report, STOPS, kind).examples[0].detail


def test_a_teacher_cache(distil, folder, world, teacher_path):
    """It is read as training reads it, but for the samples."""
    from llava_compodistill.train.cache import cli

    teacher = shutil.copytree(teacher_path, folder / "llava-teacher")
    data = write(folder, [record()])
    values = {"stage": "dft", "teacher_model_path": teacher, "model_max_length": 512}
    cache = folder / "cache"
    assert cli.main(["--output", str(cache), *whole(world, folder, data, **values)]) == 0
    given = {"teacher_cache": cache, "teacher_model_path": teacher}
    report = distil(**given)
    assert "64 likeliest of 646 tokens" in row(report, "teacher cache")[1]
    assert not [finding for finding in report.findings if finding.level == STOPS]
    other = distil(**given, model_max_length=256)
    assert "--model_max_length: 512 there, 256" in found(other, STOPS, "the pair").examples[0].detail
    # It stands for the teacher's language model.
    (teacher / "model.safetensors").unlink()
    report = distil(**given, mm_projector_type="mlp2x_gelu")
    assert not [finding for finding in report.findings if finding.level == STOPS]
    assert "of the teacher" in found(report, NOTE, "weights").examples[0].detail


def test_kinds_of_checkpoints(distil, world, dpt_path, teacher_path, folder):
    report = distil(world["qwen-teacher"])
    details = [example.detail for finding in report.findings for example in finding.examples]
    assert report.verdict == "cannot train" and any("is a language model without vision" in text for text in details)
    report = distil(model_name_or_path=dpt_path)
    assert "holds an adapter only" in found(report, STOPS, "the student").examples[0].detail
    lora = folder / "lora"
    shutil.copytree(dpt_path, lora)
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "r": 4}))
    report = distil(model_name_or_path=lora)
    assert "is a LoRA checkpoint: go on with --lora_enable" in found(report, STOPS, "the student").examples[0].detail
    report = distil(stage="sft", teacher_model_path=None, model_name_or_path=teacher_path)
    assert report.verdict == "ready" and list(report.findings) == []
    assert row(report, "checkpoint") == ("full", "", "goes on from that checkpoint")
    random = found(distil(), NOTE, "an adapter that starts from random weights")
    assert "--pretrain_mm_mlp_adapter" in random.remedy


def test_an_adapter_of_another_pair(distil, dpt_path, folder):
    other = folder / "dpt"
    shutil.copytree(dpt_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "taf_teacher_hidden_size": 96}))
    report = distil(mm_projector_type="taf", pretrain_mm_mlp_adapter=other / "mm_projector.bin")
    detail = found(report, STOPS, "an adapter of another pair").examples[0].detail
    assert "taf_teacher_hidden_size 96 there, 48 here" in detail


def test_the_output_folder(distil, folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    report = distil(save_strategy="steps")
    assert "the checkpoints need about" in found(report, STOPS, "disk space").examples[0].detail
    monkeypatch.undo()
    run = folder / "out" / "checkpoint-2"
    run.mkdir(parents=True)
    (run / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
    (run / "config.json").write_text("{}")
    torch.save({}, run / "mm_projector.bin")
    settings = {"settings": {"learning_rate": 0.5, "global_batch": 999}}
    (run / "compodistill_run.json").write_text(json.dumps(settings))
    detail = found(distil(), STOPS, "an earlier run in --output_dir").examples[0].detail
    assert "learning_rate: 0.5 there, 0.001 in this command" in detail and "global_batch" not in detail
    report = distil(resume_anyway=True)
    assert "training goes on from" in found(report, NOTE, "an earlier run in --output_dir").examples[0].detail

    class Command:
        def __reduce__(self):
            return print, ("code of a checkpoint runs",)

    torch.save(Command(), run / "rng_state.pth")
    stops = found(distil(resume_anyway=True), STOPS, "an earlier run in --output_dir").examples[0].detail
    assert "rng_state.pth" in stops
    report = distil(resume_anyway=True, trust_checkpoint=True)
    assert "training goes on from" in found(report, NOTE, "an earlier run in --output_dir").examples[0].detail


def test_a_finished_run_in_the_output_folder(distil, world, teacher_path, folder):
    tiny.run(world, "dft", folder / "out", teacher_model_path=teacher_path)
    state = json.loads((folder / "out" / "compodistill_run.json").read_text())
    report = distil(learning_rate=0.5)
    detail = found(report, STOPS, "an earlier run in --output_dir").examples[0].detail
    assert "holds the result of a finished run with other settings" in detail and "learning_rate" in detail
    made_with = {**state, "settings": {"learning_rate": 0.5}}
    (folder / "out" / "compodistill_run.json").write_text(json.dumps(made_with))
    detail = found(distil(learning_rate=0.5), NOTE, "a finished run").examples[0].detail
    assert "nothing is trained" in detail


def test_images_are_opened_as_the_towers_processor_makes_them(folder, monkeypatch):
    """CLIP's makes the shorter side of a thin image as long as its own, and the longer one with it."""
    Image.new("RGB", (8, 30)).save(folder / "images" / "thin.png")
    data = write(folder, [record("thin.png")])
    monkeypatch.setenv("COMPODISTILL_MAX_MEGAPIXELS", "0.005")
    tower = folder / "tower"
    tower.mkdir()
    flags = files_alone(folder, data, "--vision_tower", str(tower), "--image_aspect_ratio", "square")
    for size, problems in (({"height": 56, "width": 56}, 0), ({"shortest_edge": 56}, 1), (56, 1)):
        (tower / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        report = check(flags, images=True)
        assert report.images.damaged == problems, size
    assert "with the shorter side made 56 pixels" in found(report, SKIPS, "the image cannot be").examples[0].detail


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "dpt"},
        {"stage": "dft"},
        {"stage": "dft", "lora_enable": True},
        {"stage": "d2s", "method": "llava_mod"},
    ],
    ids=str,
)
def test_the_skeleton_has_the_students_sizes(world, folder, teacher_path, changes):
    from llava_compodistill.hosts.llava import register
    from llava_compodistill.hosts.llava.loader import read_config
    from llava_compodistill.pair.student import build_student, describe_taf
    from llava_compodistill.pair.teacher import load_teacher
    from llava_compodistill.train.preflight.findings import Findings
    from llava_compodistill.train.preflight.flags import parse
    from llava_compodistill.train.rehearsal import sketch_student

    register(train=True)
    values = {"teacher_model_path": teacher_path, "mm_projector_type": "taf", **changes}
    flags = whole(world, folder, write(folder, [record()]), **values)
    parsed = parse(flags, Findings())
    sketch = sketch_student(parsed.model)
    describe_taf(sketch.config, parsed.model, read_config(str(teacher_path)))
    bare = pair.skeleton(sketch.config, sketch.get_vision_tower().hidden_size, parsed)
    real = build_student(parsed.model, parsed.training, load_teacher(str(teacher_path)))

    def sizes(model):
        return {
            name: (tuple(p.shape), p.dtype, p.requires_grad)
            for name, p in model.named_parameters()
            if "vision_tower" not in name
        }

    assert sizes(bare) == sizes(real) and all(p.device.type == "meta" for p in bare.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfor name in ('llava', 'torch', 'transformers', 'rich'): sys.modules[name] = None\n"
        "from llava_compodistill.cli import main\nmain(['check', '--help'])"
    )
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0 and "--write_skip" in done.stdout, done.stderr


def test_exit_status_and_json(world, folder, capsys):
    data = write(folder, [record()])
    out = folder / "report.json"
    assert main(["check", *files_alone(folder, data), "--json", str(out), "--workers", "1"]) == 0
    report = json.loads(out.read_text())
    assert report.keys() == {
        "verdict", "exit_code", "skipped", "samples", "findings", "lengths", "images", "pair", "unchecked", "command",
        "skip_list", "seconds", "versions",
    }  # fmt: skip
    assert (report["verdict"], report["exit_code"], report["lengths"], report["pair"]) == ("ready", 0, None, None)
    assert len(report["unchecked"]) == 2 and "--model_name_or_path" in report["unchecked"][0]
    assert report["samples"]["usable"] == report["samples"]["with_image"] == 1
    data = write(folder, [record(), record("none.png")])
    assert main(["check", *files_alone(folder, data), "--json", str(out)]) == 1
    (finding,) = json.loads(out.read_text())["findings"]
    assert finding.keys() == {"kind", "level", "remedy", "count", "examples"}
    assert finding["examples"][0].keys() == {"detail", "file", "index", "id"}
    capsys.readouterr()
    assert main(["check", *files_alone(folder, folder / "none.json"), "--json", "-"]) == 2
    assert json.loads(capsys.readouterr().out)["verdict"] == "cannot train"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lengths", "many"], "--lengths many: must be a number of samples, or all"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: cannot be written"),
        (["--write_skip", "/nowhere/x.json"], "--write_skip /nowhere/x.json: cannot be written"),
    ],
)
def test_options_that_cannot_be(folder, capsys, more, message):
    assert main(["check", *files_alone(folder, write(folder, [record()])), *more]) == 2
    assert message in capsys.readouterr().err
