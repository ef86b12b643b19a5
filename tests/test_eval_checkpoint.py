"""What an evaluation asks of a checkpoint before it loads anything: that it brings no code, and its template."""

from __future__ import annotations

import json
import shutil

import pytest

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.eval import llava_answers
from llava_compodistill.eval.checkpoint import TEMPLATES, check_checkpoint, template_of
from miniature.benchmarks import write_benchmarks

#: What a checkpoint could bring along; harmless here, it only leaves a file.
CODE = """
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

Path({marker!r}).touch()


class Config(PretrainedConfig):
    model_type = {kind!r}


class Model(PreTrainedModel):
    config_class = Config
"""


def checkpoint(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hostile(folder, kind, tokenizer):
    """A checkpoint that wants its own code to be run, and the file that the code would leave."""
    marker = folder.parent / "it-ran"
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    checkpoint(folder, model_type=kind, auto_map=classes, architectures=["Model"])
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "code.py").write_text(CODE.format(marker=str(marker), kind=kind))
    return marker


@pytest.mark.parametrize("kind", ["my_llava", "llava_qwen2", "llava_llama"])
@pytest.mark.parametrize("name", ["prompt-tuned-7b", "llava-student"])  # "mpt" in a name is enough for LLaVA's builder
def test_no_code_of_a_checkpoint_runs(world, tmp_path, capsys, monkeypatch, name, kind):
    write_benchmarks(world["data"], tmp_path / "data")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = hostile(tmp_path / name, kind, world["tokenizer"])
    flags = ["--data-root", str(tmp_path / "data"), "--conv-mode", "v1", "--benchmarks", "winoground"]
    assert main(["eval", "--model-path", str(tmp_path / name), *flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "config.json: " in error and ("auto_map" in error or f"model_type '{kind}' is not supported" in error)
    questions = tmp_path / "data" / "pope" / "llava_pope_test.jsonl"
    begin = ["begin", "--questions", str(questions), "--answers", str(tmp_path / "a.jsonl")]
    assert llava_answers.main([*begin, "--model", str(tmp_path / name)]) == 2  # what scripts/eval ask first
    assert not marker.exists() and not (tmp_path / "a.jsonl.run.json").exists()


def test_no_code_of_a_base_model_runs(world, tmp_path, capsys):
    lora = checkpoint(tmp_path / "llava-lora", model_type="llava_qwen2")
    marker = hostile(tmp_path / "base", "qwen2", world["tokenizer"])
    flags = ["eval", "--model-path", str(lora), "--model-base", str(tmp_path / "base"), "--data-root", str(tmp_path)]
    assert main(flags) == 2
    assert "base/config.json: its auto_map names code" in capsys.readouterr().err and not marker.exists()


def test_types_that_are_not_llavas(tmp_path):
    for kind in TEMPLATES:
        check_checkpoint(str(checkpoint(tmp_path / kind, model_type=kind)))
    with pytest.raises(DataError, match="model_type 'llava_mpt' is not supported: there are llava_qwen2, llava_qwen3"):
        check_checkpoint(str(checkpoint(tmp_path / "mpt", model_type="llava_mpt")))
    with pytest.raises(DataError, match="model_type 'qwen2' is no LLaVA model"):
        check_checkpoint(str(checkpoint(tmp_path / "qwen", model_type="qwen2")))
    check_checkpoint("owner/name")


def test_the_template_is_the_one_that_the_checkpoint_was_trained_under(tmp_path):
    reported = []
    made_with = {"stage": "sft", "version": "0.4.0", "template": "qwen_base"}
    known = checkpoint(tmp_path / "known", model_type="llava_qwen2", compodistill=made_with)
    assert template_of(str(known), reported.append) == "qwen_base" and not reported
    # Those of earlier releases, of pre-training (whose template holds no question) and of others say nothing.
    others = [{"stage": "sft", "version": "0.3.0"}, {**made_with, "template": "plain"}, "by hand", None]
    for number, value in enumerate(others):
        path = checkpoint(tmp_path / str(number), model_type="llava_qwen2", compodistill=value)
        assert template_of(str(path), reported.append) == "qwen_1_5"
    assert len(reported) == len(others)
    assert "0/config.json names no conversation template: qwen_1_5 is taken, that of the model" in reported[0]


def test_the_command_takes_the_checkpoint_s_template_and_reports_a_guess_once(tmp_path, world, capsys):
    write_benchmarks(world["data"], tmp_path / "data")
    made_with = {"stage": "sft", "version": "0.4.0", "template": "qwen_base"}
    models = [
        checkpoint(tmp_path / "known", model_type="llava_qwen2", compodistill=made_with),
        checkpoint(tmp_path / "unknown", model_type="llava_qwen2"),
    ]
    answered = {"choices": [{"image": 0, "options": [0, 1], "picked": 0, "text": "A"}]}
    for model, template in zip(models, ("qwen_base", "qwen_1_5"), strict=True):
        run_flags = ["eval", "--model-path", str(model), "--data-root", str(tmp_path / "data"), "--device", "cpu"]
        run_flags += ["--benchmarks", "winoground"]
        _write_records(tmp_path / "data", model, template, answered)
        assert main(run_flags) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("names no conversation template: qwen_1_5 is taken") == (template == "qwen_1_5")
        assert json.loads((model / "eval" / "winoground.json").read_text())["template"] == template
    questions = tmp_path / "data" / "pope" / "llava_pope_test.jsonl"
    begin = ["begin", "--questions", str(questions), "--answers", str(tmp_path / "a.jsonl")]
    assert llava_answers.main([*begin, "--model", str(models[0])]) == 0
    found = capsys.readouterr()
    assert found.out.split()[2] == "qwen_base" and not found.err
    assert llava_answers.main([*begin, "--model", str(models[1]), "--overwrite", "1"]) == 0
    found = capsys.readouterr()
    assert found.out.split()[2] == "qwen_1_5" and found.err.count("names no conversation template") == 1


def test_a_template_that_nobody_knows_is_refused_before_anything_is_asked(tmp_path, capsys):
    made_with = {"stage": "sft", "version": "0.4.0", "template": "qwen_9"}
    model = checkpoint(tmp_path / "llava", model_type="llava_qwen2", compodistill=made_with)
    assert main(["eval", "--model-path", str(model), "--data-root", str(tmp_path)]) == 2
    assert "'qwen_9' is no conversation template" in capsys.readouterr().err


def _write_records(data, model, template, answered):
    """Winoground's records, answered before by this checkpoint: nothing is left to ask."""
    from llava_compodistill.eval.benchmarks import files, get
    from llava_compodistill.eval.checkpoint import prompt_of
    from llava_compodistill.eval.records import RecordFile, made_with
    from llava_compodistill.eval.run import Run

    with files.noted() as read:
        items = get("winoground").load(data)
    about = made_with(str(model), template, model_base=None, dtype="float32")
    hashes, prompt = files.named_below(data, read), prompt_of(str(model), template)
    run = Run(get("winoground"), items, about, model / "eval", files=hashes, prompt=prompt)
    with RecordFile(run.path, run.about, run.ids) as records:
        records.append({"id": item.id, **answered} for item in items)
