"""The engine's prompts are those of LLaVA's evaluation, under every template; and what its command refuses."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import factory
import pytest
import torch
from transformers import AutoTokenizer
from vqa import PROMPTS, both, flags, make_questions, model_folder, read, write

from llava_compodistill.errors import CheckpointError, DataError
from llava_compodistill.eval.as_llava import AsLlava
from llava_compodistill.eval.engine import Engine
from llava_compodistill.eval.requests import Answer, Likelihood
from llava_compodistill.eval.vqa_loader import chunk, main
from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.host import import_llava


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> SimpleNamespace:
    return make_questions(tmp_path_factory.mktemp("questions"))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def prompts(world, siglip, questions, tmp_path_factory) -> SimpleNamespace:
    register(train=True)
    root = tmp_path_factory.mktemp("tokenizers")
    templates = import_llava("llava.conversation").conv_templates
    text = "\n".join(f"{template.system} {' '.join(template.roles)}" for template in templates.values()) * 3
    folders = {"qwen": world["tokenizer"]}
    for legacy in (True, False):
        folders[f"llama, legacy={legacy}"] = factory.make_llama_tokenizer(root / str(legacy), legacy, text, 500)
    tokenizers = {n: AutoTokenizer.from_pretrained(str(folder), use_fast=False) for n, folder in folders.items()}
    model = factory.make_model(siglip, vocab=1200, dtype=torch.float32)
    return SimpleNamespace(model=model, tokenizers=tokenizers, templates=templates, questions=questions)


@pytest.mark.parametrize("markers", [False, True])
def test_prompts_are_llavas_under_every_template(prompts, markers, monkeypatch):
    """Against the data set that LLaVA's module reads from."""
    module = importlib.import_module("llava.eval.model_vqa_loader")
    model, asked = prompts.model, prompts.questions.asked[:5]
    monkeypatch.setattr(model.config, "mm_use_im_start_end", markers, raising=False)
    seen = set()
    for tokenizer in prompts.tokenizers.values():
        for template in prompts.templates:
            monkeypatch.setattr(module, "args", SimpleNamespace(conv_mode=template), raising=False)
            processor = model.get_vision_tower().image_processor
            data = module.CustomDataset(asked, str(prompts.questions.images), tokenizer, processor, model.config)
            engine = AsLlava(model, tokenizer, version=template)
            for number, question in enumerate(asked):
                row = engine._tokens(number, Answer(question["image"], question["text"]))
                assert row.ids == data[number][0].tolist() and row.index == number
                assert row.ids[row.image] == -200 and [*row.before, -200, *row.behind] == row.ids
                seen.add(tuple(row.ids))
    # A template's other names, and the newline that Llama's two kinds of tokenizer treat alike, give the same.
    assert len(seen) > 5 * len({id(template) for template in prompts.templates.values()})


#: Templates that LLaVA's training code writes in another way than its evaluation,
OTHERWISE = {"default", "v0", "llava_v0", "v0_mmtag", "plain", "v0_plain"}
#: and those of which it makes no labels with the tokenizers here.
UNLABELLED = {"mpt", "chatml_direct", "mistral_direct"}


def test_where_training_writes_the_same_prompts(prompts, monkeypatch):
    """Which is what `Engine` asks with, and why `AsLlava` makes its own."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)  # LLaVA warns of every sample without labels
    request = Answer("x.png", PROMPTS[1])
    for name, tokenizer in prompts.tokenizers.items():
        for template in prompts.templates:
            theirs = AsLlava(prompts.model, tokenizer, version=template)._tokens(0, request).ids
            copy = AutoTokenizer.from_pretrained(tokenizer.name_or_path, use_fast=False)  # `Engine` sets its end token
            own = Engine(prompts.model, copy, version=template)
            try:
                ids = own._tokens(0, request).ids
            except ValueError:
                ids = None
            fits = template.startswith("qwen") or (name != "qwen" and template not in UNLABELLED)
            assert (ids == theirs) == (fits and template not in OTHERWISE), (name, template)


def test_questions_alone_are_answered(prompts):
    engine = AsLlava(prompts.model, prompts.tokenizers["qwen"], version="qwen_1_5")
    with pytest.raises(ValueError, match="AsLlava cannot answer Likelihood"):
        engine.run([Likelihood("x.png", "What?", "This.")])


@pytest.mark.parametrize(
    "name, value", [("no_repeat_ngram_size", 3), ("min_new_tokens", 2), ("forced_eos_token_id", 5)]
)
def test_rules_of_decoding_that_are_not_known_are_refused(prompts, monkeypatch, name, value):
    monkeypatch.setattr(prompts.model.generation_config, name, value)
    with pytest.raises(CheckpointError, match=rf"generation_config.json .* {name} {value}, .*ENGINE=0"):
        AsLlava(prompts.model, prompts.tokenizers["qwen"], version="qwen_1_5")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.once
def test_chunks_are_llavas():
    from llava.eval.model_vqa_loader import get_chunk

    for length in (1, 5, 9, 16):
        for count in (1, 2, 3, 7, 20):
            items = list(range(length))
            parts = []
            for number in range(count):
                try:
                    expected = get_chunk(items, count, number)
                except IndexError:
                    with pytest.raises(
                        DataError, match=rf"--chunk-idx {number}: {length} questions in {count} chunks"
                    ):
                        chunk(items, count, number)
                    continue
                parts += chunk(items, count, number)
                assert chunk(items, count, number) == expected
            assert parts == items
    with pytest.raises(DataError, match="--num-chunks 0: must be 1 or more"):
        chunk([1], 0, 0)
    with pytest.raises(DataError, match="--chunk-idx -1: 1 questions"):
        chunk([1], 1, -1)


@pytest.fixture(scope="module")
def random_model(world, tmp_path_factory) -> Path:
    return model_folder(world["siglip"], world["tokenizer"], tmp_path_factory.mktemp("model") / "llava-x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"--temperature": "0.2"},
            "--temperature 0.2: the engine decodes greedily (0). LLaVA's own module can sample",
        ),
        ({"--max_new_tokens": "0"}, "--max_new_tokens 0: must be 1 or more"),
        ({"--batch-size": "-1"}, "--batch-size -1: must be 1 or more"),
        ({"--image-workers": "-1"}, "--image-workers -1: must be 0 or more"),
        ({"--chunk-idx": "1"}, "--chunk-idx 1: 17 questions in 1 chunks"),
        ({"--question-file": "none.jsonl"}, "none.jsonl: No such file"),
        ({"--image-folder": "nowhere"}, "line 1: its image nowhere/0.png is missing"),
        ({"--model-path": "nothing/at/all"}, "checkpoint not found: nothing/at/all"),
        ({"--conv-mode": "qwen_q"}, "'qwen_q' is no conversation template"),
        ({"--answers-file": "{questions}/below.jsonl"}, "below.jsonl cannot be written: [Errno 17] File exists: "),
        ({"--answers-file": "{images}"}, "cannot be written: [Errno 21] Is a directory"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    random_model, questions, tmp_path, capsys, monkeypatch, change, message
):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("llava_compodistill.eval.loading.load_engine", load)
    arguments = flags(random_model, questions.path, questions.images, tmp_path / "out" / "a.jsonl", "qwen_1_5")
    for name, value in change.items():
        arguments += [name, value.format(questions=questions.path, images=questions.images)]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_question_with_an_image_of_its_own_is_named(random_model, questions, tmp_path, capsys):
    for text in ("Is <image> red?", 7, "half \ud83d"):
        path = write(tmp_path / "q.jsonl", [questions.asked[0], {**questions.asked[1], "text": text}])
        assert main(flags(random_model, path, questions.images, tmp_path / "a.jsonl", "qwen_1_5")) == 2
        said = capsys.readouterr().err
        assert "q.jsonl, line 2: its text must be a question without <image> and without half a character" in said
        assert f"is {text!r}." in said


def test_a_broken_image_is_named_and_what_was_answered_is_kept(random_model, questions, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(questions.images, images)
    (images / "2.png").write_text("junk")
    answers = tmp_path / "a.jsonl"
    assert main([*flags(random_model, questions.path, images, answers, "qwen_1_5"), "--image-workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "5 of 17 questions have no answer, the others are kept: " in said
    assert "2.png: cannot be read as an image" in said
    assert {line["question_id"] % 3 for line in read(answers)} == {0, 1}


def test_a_plain_model_is_asked_as_llava_asks_it(world, questions, tmp_path, capsys):
    """With "plain" in its name and no "finetune": under the template's form with image tags."""
    model = model_folder(world["siglip"], world["tokenizer"], tmp_path / "llava-plain")
    both(model, questions, "v1")
    assert "llava-plain is asked" not in (said := capsys.readouterr().err) and "asked under v1_mmtag" in said
    arguments = flags(model, questions.path, questions.images, tmp_path / "a.jsonl", "qwen_1_5")
    assert main(arguments) == 2
    assert "under the template qwen_1_5_mmtag, and there is none. Rename the folder" in capsys.readouterr().err
    both(model.rename(tmp_path / "llava-plain-finetune"), questions, "v1")
    assert "mmtag" not in capsys.readouterr().err


@pytest.mark.once
def test_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "llava_compodistill.eval.vqa_loader", "--help"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.returncode == 0 and "--batch-size" in done.stdout and "--conv-mode" in done.stdout
