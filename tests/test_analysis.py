"""`llava-compodistill analyze`: samples, where answers and phrases look, interventions, and the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import make_batch, make_model
from PIL import Image

from llava_compodistill.analysis import cli
from llava_compodistill.analysis.answers import answer_attention
from llava_compodistill.analysis.experiments import Mean, probability_by_similarity
from llava_compodistill.analysis.overlay import phrase_tokens
from llava_compodistill.analysis.samples import Sample, read_samples, thinned
from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.record.attention import attention_modules
from llava_compodistill.record.blend import blended_attention
from llava_compodistill.record.merge import record_merge
from miniature import weights
from miniature.benchmarks import write_benchmarks

LAYOUTS = ["qIqqIqaaqa", "Iqaa", "qqIqqaqaa"]


@pytest.fixture
def models(siglip, monkeypatch):
    from functools import partial

    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))  # see test_rivals.py
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, attention="eager")
    return make_model(siglip, seed=2, attention="eager"), teacher


def whole(model, batch, **options):
    with torch.no_grad(), record_merge(model) as recorder:
        outputs = model(**batch.inputs, use_cache=False, output_attentions=True, output_hidden_states=True, **options)
    return outputs, recorder.batch


# ---------------------------------------------------------------------------------------------------------------------
# Where answers look
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", ["visual", "text"])
def test_the_answers_attention_over_either_kind_of_token(models, keys):
    student, _ = models
    batch = make_batch(LAYOUTS)
    outputs, merged = whole(student, batch)
    found, _ = answer_attention(student, batch.inputs, keys)
    assert found.shape[:2] == (4, 3)
    for layer, attention in enumerate(outputs.attentions):
        for sample in range(3):
            places = (merged.visual if keys == "visual" else merged.real & ~merged.visual)[sample]
            expected = attention[sample].mean(0)[merged.answer_mask()[sample]].mean(0)[places]
            torch.testing.assert_close(found[layer, sample, : len(expected)], expected.float(), atol=1e-6, rtol=1e-5)
            assert not found[layer, sample, len(expected) :].any()


# ---------------------------------------------------------------------------------------------------------------------
# Intervention
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_blended_head_is_the_sum_of_values_under_the_blended_attention(siglip, models, backend):
    student = make_model(siglip, seed=2, attention=backend)
    eager, _ = models
    batch, layer, share = make_batch(LAYOUTS), 1, 0.3
    outputs, merged = whole(eager, batch)
    module = attention_modules(eager)[layer]
    states = eager.get_model().layers[layer].input_layernorm(outputs.hidden_states[layer])
    values = module.v_proj(states).view(3, -1, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)  # [B, H, N, d]
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, states.shape[1], merged.visual_index.shape[1], generator=generator, dtype=torch.float64)
    expected = outputs.attentions[layer].clone()
    for sample, index in enumerate(merged.visual_index):
        keys = index[index >= 0]
        for row in merged.answer_mask()[sample].nonzero().flatten().tolist():
            own = expected[sample, :, row, keys]
            expected[sample, :, row, keys] = (1 - share) * own + share * target[sample, row, : len(keys)]
            expected[sample, :, row] /= expected[sample, :, row].sum(-1, keepdim=True)
    expected = (expected @ values).transpose(1, 2).reshape(3, -1, 32)
    seen = []
    with torch.no_grad(), record_merge(student) as recorder:
        with blended_attention(student, [layer], lambda: {layer: target}, lambda: recorder.batch, share):
            hook = attention_modules(student)[layer].o_proj.register_forward_hook(
                lambda module, args, output: seen.append(args[0])
            )
            blended = student(**batch.inputs, use_cache=False).logits
        hook.remove()
    real = merged.real
    torch.testing.assert_close(seen[0][real], expected[real], atol=1e-6, rtol=1e-4)
    with torch.no_grad(), record_merge(student):
        untouched = student(**batch.inputs, use_cache=False).logits
    torch.testing.assert_close(untouched[real], outputs.logits[real])
    answers = merged.answer_mask()
    before = real & (answers.long().cumsum(dim=1) == 0)
    torch.testing.assert_close(blended[before], untouched[before])
    assert not torch.allclose(blended[answers], untouched[answers])


# ---------------------------------------------------------------------------------------------------------------------
# Samples and phrases
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}]
    (tmp_path / "llava.json").write_text(
        json.dumps([{"image": "a.png", "conversations": turns}, {"conversations": turns}])
    )
    (tmp_path / "lines.jsonl").write_text(
        '{"image": "a.png", "text": "What?", "answer": "Red", "category": "color"}\n'
    )
    return tmp_path


def test_samples_of_files(files):
    (sample,) = read_samples(str(files / "llava.json"), str(files))
    assert sample == Sample(str(files / "a.png"), "What?", "Red")
    (sample,) = read_samples(str(files / "lines.jsonl"), str(files))
    assert sample.subset == "color" and sample.asked("Blue").answer == "Blue"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"image": "a.png"}', "line 1: must be a JSON object with image, text and answer"),
        ("a.json", '[{"image": "a.png"}]', "must be LLaVA's format"),
        ("a.json", "[]", "holds no sample with an image"),
        ("a.jsonl", '{"image": "b.png", "text": "?", "answer": "x"}', "b.png is missing; --images names the folder"),
    ],
)
def test_wrong_files_are_named(files, name, text, message):
    (files / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_samples(str(files / name), str(files))


def test_sources_that_are_none():
    with pytest.raises(DataError, match="neither a file nor a benchmark .*sugarcrepe"):
        read_samples("nothing")
    with pytest.raises(DataError, match="sugarcrepe is a benchmark: give the folder of its files with --data-root"):
        read_samples("sugarcrepe")


def test_thinning_takes_from_all_over():
    assert thinned(range(10), 3) == [0, 3, 6] and thinned([1, 2], 5) == [1, 2] and thinned(range(4), 0) == [0, 1, 2, 3]


def test_the_tokens_of_a_phrase_are_found(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]))
    text = "a red square above a blue circle, a red square"
    ids = [5, -200, *tokenizer(text).input_ids]
    for phrase in ("blue circle", "above", "red square", "quare above"):
        places = phrase_tokens(tokenizer, ids, phrase)
        assert places == list(range(places[0], places[-1] + 1))
        spelled = tokenizer.decode([ids[place] for place in places])
        assert phrase in spelled and phrase not in tokenizer.decode([ids[place] for place in places[1:]])
    assert phrase_tokens(tokenizer, ids, "red square")[-1] == len(ids) - 1, "the last one"
    with pytest.raises(DataError, match="does not hold the phrase 'green'"):
        phrase_tokens(tokenizer, ids, "green")


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def test_bins_are_of_equal_size_and_in_order():
    generator = np.random.default_rng(0)
    alike = generator.random(101).tolist()
    found = probability_by_similarity(alike, [value**2 for value in alike], bins=10)
    assert sum(point.n for point in found.similarity) == 101 and {point.n for point in found.similarity} == {10, 11}
    assert found.correlation == pytest.approx(1) and found.p < 1e-6
    values = [point.value for point in found.similarity]
    assert values == sorted(values)
    with pytest.raises(ValueError, match="5 samples cannot fill 10 bins"):
        probability_by_similarity(alike[:5], alike[:5])


def test_a_mean_has_its_interval():
    found = Mean.of([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.n) == (2.5, 4) and found.half == pytest.approx(1.96 * np.std([1, 2, 3, 4], ddof=1) / 2)


def test_checkpoints_are_named_by_what_tells_them_apart():
    assert cli._names(["a/llava", "b/llava", "teacher"]) == ["a", "b", "teacher"]
    assert cli._names(["a/x", "b/y"]) == ["x", "y"] and cli._names(["a/x", "a/x/x"])[0] != "x"
    assert cli._names(["a/x", "b/x"], "one, two") == ["one", "two"]
    with pytest.raises(DataError, match="--names one: there must be 2 different names"):
        cli._names(["a/x", "b/x"], "one")
    with pytest.raises(DataError, match="named twice"):
        cli._names(["a/x", "a/x"])


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
def test_the_command_makes_every_figure(distilled, tmp_path):
    write_benchmarks(distilled / "data", tmp_path / "data")
    teacher, student = distilled / "models" / "llava-teacher", distilled / "llava-student"
    common = ["--conv-mode", "qwen_qa", "--device", "cpu", "--output", str(tmp_path)]
    common += ["--data-root", str(tmp_path / "data"), "--images", str(distilled / "data" / "images")]
    questions = str(distilled / "data" / "relation_test.jsonl")

    def figures(analysis, checkpoints, *flags):
        assert main(["analyze", analysis, *map(str, checkpoints), *common, *flags]) == 0
        with Image.open(tmp_path / f"{analysis}.png") as image:
            assert image.width > 400 and len(set(image.convert("L").resize((40, 40)).tobytes())) > 20
        return json.loads((tmp_path / f"{analysis}.json").read_text())["found"]

    pair = [teacher, student]
    found = figures("similarity", pair, "--data", questions, "--data", "sugarcrepe", "--limit", "8")
    assert [(panel["data"], panel["keys"]) for panel in found] == [
        ("relation_test", "visual"), ("relation_test", "text"), ("sugarcrepe", "visual"), ("sugarcrepe", "text"),
    ]  # fmt: skip
    assert all(len(panel["layers"]) == 6 and 0 < panel["layers"][0]["value"] < 1 for panel in found)
    found = figures("probability", pair, "--data", questions, "--bins", "3")
    assert len(found["llava-student"]["probability"]) == 3
    found = figures("intervention", pair, "--data", "sugarcrepe", "--limit", "7")["llava-student"]
    assert (
        set(found["difference"]) == {"", *(f"{kind}" for kind in found["before"] if kind)} and len(found["before"]) > 3
    )
    found = figures("knockout", [teacher], "--data", questions)["llava-teacher"]
    accuracy = [layer["accuracy"]["value"] for layer in found["without_layer"]]
    reading = accuracy.pop(3)
    assert found["whole"]["accuracy"]["value"] > 90 and reading < 75 < min(accuracy), "it reads in layer 3"
    found = figures("overlay", pair, "--data", questions, "--phrase", "the", "--items", "2")
    assert len(found) == 2 and np.shape(found[0]["attention"]["llava-student"]) == (3, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["overlay", "a", "--data", "x"], "overlay compares models with a teacher"),
        (["probability", "a", "b", "--data", "x", "--data", "y"], "--data can be repeated for similarity alone"),
        (["similarity", "a", "b", "--data", "x", "--band", "middle"], "--band 'middle'"),
        (["intervention", "a", "b", "--data", "x", "--share", "0"], "--share 0.0: must be above 0"),
        (["stare", "a", "--data", "x"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_models_that_read_other_prompts_are_not_compared(tmp_path):
    folders = {"one": str(tmp_path / "one"), "two": str(tmp_path / "two")}
    for path, template in zip(folders.values(), ("qwen_1_5", "qwen_qa"), strict=True):
        config = {"model_type": "llava_qwen2", "compodistill": {"template": template}}
        Path(path).mkdir()
        (Path(path) / "config.json").write_text(json.dumps(config))
    args = argparse.Namespace(analysis="similarity", conv_mode=None)
    with pytest.raises(DataError, match=r"templates \(one: qwen_1_5, two: qwen_qa\).*--conv-mode names one for all"):
        cli._templates(folders, args)
    args.analysis = "overlay"
    assert list(cli._templates(folders, args).values()) == ["qwen_1_5", "qwen_qa"]
    args = argparse.Namespace(analysis="similarity", conv_mode="qwen_base")
    assert set(cli._templates(folders, args).values()) == {"qwen_base"}


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="checkpoint not found"):
        cli.main(["knockout", str(tmp_path / "none"), "--data", "x"])
