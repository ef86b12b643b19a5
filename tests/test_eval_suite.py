"""The six benchmarks on the miniature's held-out sets with its stored teacher, which has learned to see."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest

from llava_compodistill.cli import main
from llava_compodistill.eval import protocols, shares
from llava_compodistill.eval.benchmarks import registered
from llava_compodistill.eval.benchmarks.base import EngineBenchmark
from miniature import weights
from miniature.benchmarks import write_benchmarks
from miniature.language import CAPTION_PROMPT

OURS = registered(EngineBenchmark)
pytestmark = pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """Flags of `eval` for the stored teacher and the test world's benchmarks."""
    root = tmp_path_factory.mktemp("eval")
    write_benchmarks(world["data"], root / "data")
    weights.install(root / "models")
    model = root / "models" / "llava-teacher"
    common = ["--model-path", str(model), "--data-root", str(root / "data"), "--conv-mode", "qwen_qa"]
    return {"root": root, "flags": ["eval", *common, "--caption-prompt", CAPTION_PROMPT, "--device", "cpu"]}


def summaries(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if ".run." not in path.name}


def test_all_six_run_and_the_teacher_sees(place, capsys):
    output = place["root"] / "likelihood"
    flags = [*place["flags"], "--benchmarks", ",".join(OURS), "--output", str(output)]
    assert main([*flags, "--protocol", "likelihood"]) == 0
    found = summaries(output)
    assert set(found) == set(OURS)
    # A few items each: far above chance, not a measurement.
    assert found["sugarcrepe"]["value"] > 80 and found["winoground"]["value"] > 80 and found["bivlc"]["value"] > 80
    assert found["sade"]["value"] > 80 and found["rbench"]["value"] > 80
    assert found["winoground"]["figures"]["group"] > 50 and found["reefknot"]["figures"]["yesno"]["accuracy"] > 80
    printed = capsys.readouterr().out.partition("scores in %")[2]  # after the rates, which may be any number
    assert "CR average" not in printed  # the paper chose by letters
    assert "SugarCrepe" in printed and "R-Bench masks" in printed and "79.1" in printed and "83.0" not in printed
    lines = (output / "rbench.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == {"Yes", "No"}  # raw answers are kept


@pytest.mark.parametrize("protocol", ["yes", "choice", "choice-logits"])
def test_the_other_protocols(place, protocol):
    """The teacher knows neither form of question: they run, and count what they cannot read."""
    output = place["root"] / protocol
    flags = [*place["flags"], "--output", str(output), "--protocol", protocol, "--benchmarks", "sugarcrepe,winoground"]
    assert main(flags) == 0
    found = summaries(output)
    for summary in found.values():
        assert 0 <= summary["value"] <= 100 and summary["protocol"] == protocol
        assert ("unparsable" in summary["figures"]) == (protocol in protocols.CHOOSING)
    record = json.loads((output / "winoground.jsonl").read_text().splitlines()[0])
    if protocol == "yes":
        assert len(record["scores"]) == 2 and len(record["yes_no"]) == 4
    else:
        assert [choice["image"] for choice in record["choices"]] == [0, 0, 1, 1]


def test_a_killed_run_is_gone_on_with_and_has_the_same_summary(place):
    whole, resumed = place["root"] / "whole", place["root"] / "resumed"
    flags = [*place["flags"], "--protocol", "likelihood", "--benchmarks", "bivlc"]
    assert main([*flags, "--output", str(whole)]) == 0
    assert main([*flags, "--output", str(resumed)]) == 0
    records = (resumed / "bivlc.jsonl").read_bytes()
    (resumed / "bivlc.json").unlink()
    (resumed / "bivlc.jsonl").write_bytes(records[: len(records) // 2])  # in the middle of a line
    assert main([*flags, "--output", str(resumed)]) == 0
    assert (resumed / "bivlc.json").read_text() == (whole / "bivlc.json").read_text()
    assert (resumed / "bivlc.jsonl").read_bytes() == records
    # Nothing is asked again: the scores that are there are believed.
    first, *others = records.decode().splitlines()
    changed = json.loads(first) | {"scores": [[0, 1], [1, 0]]}
    (resumed / "bivlc.jsonl").write_text("\n".join([json.dumps(changed), *others]) + "\n")
    assert main([*flags, "--output", str(resumed)]) == 0
    assert summaries(resumed)["bivlc"]["figures"]["i2t"] < summaries(whole)["bivlc"]["figures"]["i2t"]


def test_another_protocol_does_not_go_on_with_these_records(place, capsys):
    output = place["root"] / "mixed"
    flags = [*place["flags"], "--output", str(output), "--benchmarks", "winoground"]
    assert main([*flags, "--protocol", "likelihood"]) == 0
    assert main([*flags, "--protocol", "yes"]) == 2
    assert "protocol 'likelihood', not 'yes'" in " ".join(capsys.readouterr().out.split())
    records = (output / "winoground.jsonl").read_text()
    both = ["--benchmarks", "winoground,sade", "--data-root", str(place["root"] / "half")]
    shutil.copytree(place["root"] / "data" / "winoground", place["root"] / "half" / "winoground")
    assert main([*flags, *both, "--protocol", "yes", "--overwrite"]) == 2  # nothing is lost before all is checked
    assert (output / "winoground.jsonl").read_text() == records
    assert main([*flags, "--protocol", "yes", "--overwrite"]) == 0


def test_a_checkpoint_is_known_by_its_weights_wherever_it_lies(place, capsys, tmp_path):
    model, output = tmp_path / "llava-copy", tmp_path / "out"
    shutil.copytree(place["root"] / "models" / "llava-teacher", model)
    flags = ["eval", "--model-path", str(model), *place["flags"][3:], "--output", str(output)]
    flags += ["--benchmarks", "winoground", "--protocol", "likelihood"]
    assert main(flags) == 0
    os.utime(model / "config.json", (1, 1))
    moved = model.rename(tmp_path / "llava-moved")
    flags[2] = str(moved)
    assert main(flags) == 0 and "answered before" in capsys.readouterr().out
    weights = next(moved.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\0\0\0\0"  # trained again
    weights.write_bytes(data)
    assert main(flags) == 2
    assert "weights that give" in " ".join(capsys.readouterr().out.split())
    assert main([*flags, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-path", "nope/ckpt/x"], "checkpoint not found: nope/ckpt/x"),
        (["--model-path", "{empty}"], "config.json does not tell the model's type: is "),
        (["--model-path", "{qwen}"], "model_type 'qwen2' is no LLaVA model"),
        (["--conv-mode", "qwen_q"], "'qwen_q' is no conversation template (--version, --conv-mode). Known: "),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--data-root", "nowhere"], "--data-root nowhere: there is no such folder"),
    ],
)
def test_wrong_arguments_are_said_at_once(place, world, tmp_path, capsys, flags, message):
    flags = [flag.format(empty=tmp_path, qwen=world["qwen-student"]) for flag in flags]
    assert main([*place["flags"], "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "must be a number of 1 or more, is '0'"),
        (["--processes", "-1"], "must be a number of 1 or more"),
        (["--device", "gpu"], "must be cuda, cuda:N or cpu, is 'gpu'"),
    ],
)
def test_wrong_flags_are_explained(place, capsys, flags, message):
    with pytest.raises(SystemExit):
        main([*place["flags"], *flags])
    assert message in capsys.readouterr().err


def test_a_broken_image_ends_its_benchmark_alone(place, world, tmp_path, capsys):
    write_benchmarks(world["data"], tmp_path)
    for name in ("bivlc", "winoground"):
        (tmp_path / name / "images").unlink()
        shutil.copytree(world["data"] / "images", tmp_path / name / "images")
    image = json.loads((tmp_path / "bivlc" / "bivlc.jsonl").read_text().splitlines()[0])["image"]
    (tmp_path / "bivlc" / "images" / image).write_text("junk")
    flags = [*place["flags"], "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*flags, "--benchmarks", "BiVLC, winoground", "--protocol", "likelihood"]) == 1
    printed = capsys.readouterr().out
    assert printed.count(f"{image}: cannot be read as an image") == 2 and "Winoground" in printed
    assert set(summaries(tmp_path / "out")) == {"winoground"}


def test_the_others_of_a_broken_image_are_kept_and_the_same_command_ends_it(place, world, tmp_path, capsys):
    write_benchmarks(world["data"], tmp_path)
    shutil.copytree(tmp_path / "winoground" / "images", tmp_path / "copies")
    (tmp_path / "winoground" / "images").unlink()
    (tmp_path / "copies").rename(tmp_path / "winoground" / "images")
    entries = [json.loads(line) for line in (tmp_path / "winoground" / "examples.jsonl").read_text().splitlines()]
    broken = [tmp_path / "winoground" / "images" / entries[number]["image_1"] for number in (1, 3)]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[:50])
    flags = [*place["flags"], "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    flags += ["--benchmarks", "winoground", "--protocol", "likelihood", "--image-workers", "1"]
    assert main(flags) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"2 of {len(entries)} items are not answered; the others are kept" in printed
    for path, line in zip(broken, (2, 4), strict=True):
        assert f"{path}: cannot be read as an image" in printed
        assert f"{tmp_path / 'winoground' / 'examples.jsonl'}, line {line}: {path}: cannot be" in printed
    kept = [json.loads(line)["id"] for line in (tmp_path / "out" / "winoground.jsonl").read_text().splitlines()]
    assert kept == [str(entry["id"]) for number, entry in enumerate(entries) if number not in (1, 3)]
    assert main(flags) == 1  # again, while nothing has changed
    assert f"2 of {len(entries)} items are not answered" in " ".join(capsys.readouterr().out.split())
    for path, data in zip(broken, whole, strict=True):
        path.write_bytes(data)
    assert main(flags) == 0
    whole_run = tmp_path / "at-once"
    assert main([*flags, "--output", str(whole_run)]) == 0
    assert (whole_run / "winoground.json").read_text() == (tmp_path / "out" / "winoground.json").read_text()


def test_texts_that_cannot_be_asked_are_named_and_the_others_are_kept(place, world, tmp_path, capsys):
    write_benchmarks(world["data"], tmp_path)
    path = tmp_path / "winoground" / "examples.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[1]["caption_0"] = "a red <image> circle"
    entries[2]["caption_1"] = "red " * 50_000
    entries[3]["caption_1"] = "red\ud800"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    flags = [*place["flags"], "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    # As an answer, <image> is text like any other under Qwen's templates; in a prompt it would be another image.
    for protocol, bad in (("likelihood", [2, 3]), ("choice", [1, 2, 3])):
        assert main([*flags, "--benchmarks", "winoground", "--protocol", protocol, "--overwrite"]) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert (f"{path}, line 2: the prompt" in printed) == (1 in bad)
        assert f"{path}, line 3: 5" in printed and "tokens with the image, the model reads" in printed
        assert f"{path}, line 4: " in printed and "half a character" in printed
        kept = [json.loads(line)["id"] for line in (tmp_path / "out" / "winoground.jsonl").read_text().splitlines()]
        assert kept == [str(entry["id"]) for number, entry in enumerate(entries) if number not in bad]


def test_a_model_of_nan_has_no_scores(place, tmp_path, capsys):
    """Neither by likelihoods nor by answers in words."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "llava-nan"
    shutil.copytree(place["root"] / "models" / "llava-teacher", model)
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        name = next((name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight")), None)
        if name:
            tensors[name] = tensors[name].float()
            tensors[name][0] = 3e38  # its products overflow; NaN itself is refused when the model is loaded
            save_file(tensors, path, {"format": "pt"})
    flags = ["eval", "--model-path", str(model), *place["flags"][3:], "--output", str(tmp_path / "out")]
    for protocol in ("likelihood", "choice", "choice-logits"):
        assert main([*flags, "--benchmarks", "winoground,rbench", "--protocol", protocol, "--overwrite"]) == 1
        assert capsys.readouterr().out.count("logits are NaN or infinite: its weights are damaged") == 4
    assert not list((tmp_path / "out").glob("winoground.json"))


def test_workers_change_nothing(place):
    """Records and summaries, byte for byte: one image, two images and marked ones an item, and answers in words."""
    flags = [*place["flags"], "--benchmarks", "sugarcrepe,bivlc,rbench-box,rbench-mask", "--batch-size", "5"]
    outputs = [place["root"] / f"workers-{workers}" for workers in (0, 2)]
    for workers, output in zip((0, 2), outputs, strict=True):
        assert main([*flags, "--image-workers", str(workers), "--output", str(output)]) == 0
    for path in sorted(outputs[0].glob("*")):
        assert path.read_bytes() == (outputs[1] / path.name).read_bytes(), path.name


def test_a_summary_holds_what_a_stranger_needs(place):
    import hashlib

    from llava_compodistill import __version__

    output = place["root"] / "pins"
    flags = [*place["flags"], "--output", str(output), "--benchmarks", "sugarcrepe,rbench,winoground"]
    assert main([*flags, "--protocol", "choice"]) == 0
    found = {name: summary["pins"] for name, summary in summaries(output).items()}
    path = place["root"] / "data" / "sugarcrepe" / "swap_obj.json"
    assert found["sugarcrepe"]["files"]["swap_obj.json"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert len(found["sugarcrepe"]["files"]) == 7 and len(found["rbench"]["files"]) == 6
    assert found["sugarcrepe"]["prompt"] == "<image>\n{question}\nAnswer:"
    assert found["sugarcrepe"]["question"] == protocols.CHOICE_PROMPT
    assert found["sugarcrepe"]["max_new_tokens"] == [32] and found["rbench"]["max_new_tokens"] == [128]
    assert set(found["sugarcrepe"]["reading"]) == set(found["rbench"]["reading"]) == {"strict", "official"}
    assert {pins["decoding"] for pins in found.values()} == {"greedy"}
    assert {pins["dtype"] for pins in found.values()} == {"float32"}
    assert summaries(output)["rbench"]["version"] == __version__


def test_a_stopped_run_says_that_it_goes_on(place, monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_compodistill.eval.cli.load", stop)
    assert main([*place["flags"], "--benchmarks", "winoground", "--output", str(tmp_path)]) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


def test_a_full_disk_is_said_and_the_same_command_goes_on(place, monkeypatch, capsys, tmp_path):
    flags = [*place["flags"], "--benchmarks", "winoground", "--output", str(tmp_path / "out")]
    sync, full = os.fsync, [OSError(errno.ENOSPC, "No space left on device")]

    def fsync(handle):
        if full:
            raise full.pop()
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "cannot be written: No space left on device" in error and "what was answered is kept" in error
    assert main(flags) == 0 and (tmp_path / "out" / "winoground.json").is_file()


def test_a_path_is_the_same_however_it_is_written_and_another_base_is_not(place, capsys, monkeypatch):
    output = place["root"] / "written"
    flags = [*place["flags"], "--output", str(output), "--benchmarks", "winoground", "--protocol", "likelihood"]
    assert main(flags) == 0
    monkeypatch.chdir(place["root"])
    number = flags.index("--model-path") + 1
    assert main([*flags[:number], "models/llava-teacher/", *flags[number + 1 :]]) == 0
    assert "answered before" in capsys.readouterr().out
    assert main([*flags, "--model-base", "other"]) == 2
    assert "another run: model_base None, not 'other'" in " ".join(capsys.readouterr().out.split())
    assert main([*flags, "--dtype", "bfloat16"]) == 2
    assert "dtype 'float32', not 'bfloat16'" in " ".join(capsys.readouterr().out.split())


def test_a_lora_is_asked_on_its_base(place, world, teacher_path, tmp_path):
    """As `train --lora_enable` saves it: the base is found by itself, and LLaVA's own modules find it too."""
    import tiny

    lora = tmp_path / "llava-lora"
    adapter = {"mm_projector_type": "mlp2x_gelu", "learning_rate": 1e-2}
    tiny.run(world, "sft", lora, model_name_or_path=teacher_path, lora_enable=True, **adapter)
    scores = {}
    for model in (teacher_path, lora):
        flags = ["eval", "--model-path", str(model), *place["flags"][3:], "--output", str(tmp_path / model.name)]
        assert main([*flags, "--benchmarks", "winoground", "--protocol", "likelihood"]) == 0
        lines = (tmp_path / model.name / "winoground.jsonl").read_text().splitlines()
        scores[model] = np.array([json.loads(line)["scores"] for line in lines])
    apart = np.abs(scores[lora] - scores[teacher_path]).max()
    assert 1e-3 < apart < 10  # trained on, not begun anew


def test_a_benchmark_that_is_wrong_is_said_and_the_others_run(place, world, tmp_path, capsys):
    """Not like one that nobody has got, which is left out of `all`."""
    write_benchmarks(world["data"], tmp_path)
    for name in ("bivlc", "sugarcrepe", "reefknot", "gqa", "vqav2", "vizwiz", "textvqa", "MME"):
        shutil.rmtree(tmp_path / name)
    lines = (tmp_path / "winoground" / "examples.jsonl").read_text().splitlines()
    (tmp_path / "winoground" / "examples.jsonl").write_text("\n".join([lines[0], *lines]) + "\n")
    (tmp_path / "pope" / "llava_pope_test.jsonl").write_text('{"question_id": 1, "image": "no.png", "text": "?"}')
    kept = [line for line in (tmp_path / "sade" / "sade.jsonl").read_text().splitlines() if '"negate"' in line]
    (tmp_path / "sade" / "sade.jsonl").write_text("\n".join(kept) + "\n")
    flags = [*place["flags"], "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*flags, "--protocol", "likelihood"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("left out:") == 8 and printed.count("error:") == 4  # before, and again at the end
    assert "examples.jsonl, line 2: the id '0' is that of" in printed
    assert "llava_pope_test.jsonl, line 1: its image" in printed and "no.png is missing" in printed
    assert set(summaries(tmp_path / "out")) == {"sade", "rbench", "rbench-box", "rbench-mask"}
    # SADE with one category of six is not SADE.
    assert (
        "macro (part)" in printed
        and "Incomplete: no data for comprehensive, relation, attribute, atomic, content" in printed
    )


def test_missing_data_is_said_before_the_model_is_loaded(place, capsys, tmp_path):
    flags = [*place["flags"], "--data-root", str(tmp_path), "--conv-mode", "v1"]
    assert main([*flags, "--benchmarks", "sade"]) == 2
    assert "the images of sade are in none of" in " ".join(capsys.readouterr().out.split())
    assert main(flags) == 2  # all: each is left out with its reason
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("left out:") == 14 and "hf auth login" in printed and "docs/Evaluation.md" in printed
    assert "There is nothing to evaluate in --data-root" in printed
    assert main([*flags, "--benchmarks", "sugarcrab"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "unknown sugarcrab; there are sugarcrepe" in printed and "Did you mean sugarcrepe?" in printed
    assert main([*place["flags"], "--benchmarks", "sade", "--protocol", "choice"]) == 2
    assert "SADE has likelihood, yes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.once
@pytest.mark.long
def test_two_processes_give_the_records_of_one(place):
    alone, shared = place["root"] / "alone", place["root"] / "shared"
    flags = [*place["flags"], "--protocol", "likelihood", "--benchmarks", "sugarcrepe"]
    assert main([*flags, "--output", str(alone)]) == 0
    # A share that an earlier run left behind is not asked again, whatever it says.
    first = json.loads((alone / "sugarcrepe.jsonl").read_text().splitlines()[0])
    assert main([*flags, "--output", str(shared)]) == 0
    run = json.loads((shared / "sugarcrepe.jsonl.run.json").read_text())
    for path in shared.iterdir():
        path.unlink()
    left = shares.share_path(shared / "sugarcrepe.jsonl", 2, 3)
    left.write_text(json.dumps(first | {"scores": [[0.0], [7.0]]}) + "\n")
    left.with_name(left.name + ".run.json").write_text(json.dumps(run))
    assert main([*flags, "--output", str(shared), "--processes", "2"]) == 0
    assert sorted(path.name for path in shared.iterdir()) == [
        "sugarcrepe.json", "sugarcrepe.jsonl", "sugarcrepe.jsonl.run.json",
    ]  # fmt: skip
    records = {r["id"]: r for r in map(json.loads, (alone / "sugarcrepe.jsonl").read_text().splitlines())}
    found = {r["id"]: r for r in map(json.loads, (shared / "sugarcrepe.jsonl").read_text().splitlines())}
    assert found.pop(first["id"])["scores"] == [[0.0], [7.0]] and records.pop(first["id"])
    assert found.keys() == records.keys()
    for key, record in records.items():
        # In other batches the sums are taken in another order.
        assert np.allclose(record["scores"], found[key]["scores"], atol=1e-4)


def test_every_gpu_gets_a_process(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert shares.devices(None, None) == [None] and shares.devices("cpu", 3) == [None] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert shares.devices(None, None) == shares.devices("cuda", None) == ["0", "1"]
    assert shares.devices("cuda:1", None) == ["1"] and shares.devices("cpu", None) == [None]
    assert shares.devices(None, 3) == ["0", "1", "0"] and shares.devices(None, 1) == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert shares.devices(None, None) == ["6", "7"] and shares.devices("cuda:1", None) == ["7"]


@pytest.mark.once
@pytest.mark.long
def test_a_failing_process_stops_the_others_and_is_named(place, capfd, tmp_path):
    model = tmp_path / "llava-broken"
    shutil.copytree(place["root"] / "models" / "llava-teacher", model)
    next(model.glob("*.safetensors")).write_bytes(b"junk")
    flags = [*place["flags"], "--protocol", "likelihood", "--benchmarks", "winoground", "--processes", "2"]
    assert main([*flags, "--output", str(tmp_path / "failing"), "--model-path", str(model)]) == 1
    assert "of 2 failed; what was answered is kept" in " ".join(capfd.readouterr().out.split())
