"""The engine in the place of LLaVA's model_vqa_loader: the same tokens in, the same tokens out, the same files.

LLaVA's own module runs in this process, with what its model generates written down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import factory
import pytest
from vqa import (
    PROMPTS,
    asked_through_engine,
    asked_through_llava,
    assert_same_answers,
    both,
    flags,
    make_questions,
    model_folder,
    read,
    write,
)

from llava_compodistill import about
from llava_compodistill.errors import DataError
from llava_compodistill.eval import cli, llava_answers
from llava_compodistill.eval.as_llava import AsLlava
from llava_compodistill.eval.benchmarks import registered
from llava_compodistill.eval.benchmarks.llava import LlavaBenchmark
from llava_compodistill.eval.llava_suite import run_llava_benchmark, summarize
from llava_compodistill.eval.vqa_loader import main
from miniature import weights
from miniature.benchmarks import write_benchmarks

SIX = registered(LlavaBenchmark)


# ---------------------------------------------------------------------------------------------------------------------
# The six benchmarks with the stored teacher
# ---------------------------------------------------------------------------------------------------------------------
needs_teacher = pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")


@pytest.fixture(scope="module")
def place(world, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("six")
    write_benchmarks(world["data"], root / "data")
    weights.install(root / "models")
    return SimpleNamespace(root=root, data=root / "data", model=root / "models" / "llava-teacher")


@pytest.fixture(scope="module")
def asked(place) -> dict[str, SimpleNamespace]:
    """What LLaVA's module answers to each benchmark's questions, asked once."""
    found = {}
    for name, benchmark in SIX.items():
        answers = place.root / "llava" / f"{name}.jsonl"
        arguments = begun(place, name, answers, engine=False)
        tokens = asked_through_llava(arguments)
        summary = finished(place, name, answers)
        found[name] = SimpleNamespace(tokens=tokens, answers=answers, summary=summary, benchmark=benchmark)
    return found


def begun(place, name: str, answers: Path, engine: bool) -> list[str]:
    """The first step of scripts/eval/NAME.sh; the flags of the next."""
    benchmark = SIX[name]
    begin = ["begin", "--questions", str(place.data / benchmark.questions), "--answers", str(answers)]
    begin += ["--images", str(place.data / benchmark.images), "--model", str(place.model), "--max-new-tokens", "6"]
    assert llava_answers.main([*begin, "--engine", str(int(engine))]) == 0
    folder = answers.with_suffix("")
    return flags(place.model, folder / "left.jsonl", place.data / benchmark.images, folder / "1_0.jsonl", "qwen_qa")


def finished(place, name: str, answers: Path) -> dict:
    join = ["join", "--questions", str(place.data / SIX[name].questions), "--answers", str(answers)]
    assert llava_answers.main(join) == 0
    return summarize(name, answers, place.data, answers.parent / "output")


@needs_teacher
@pytest.mark.parametrize("name", SIX)
def test_the_six_are_answered_token_by_token_as_by_llavas_module(place, asked, name):
    theirs = asked[name]
    answers = place.root / "engine" / f"{name}.jsonl"
    tokens = asked_through_engine(begun(place, name, answers, engine=True))
    assert len(tokens) > 10 and tokens == theirs.tokens
    assert len({tuple(answer) for answer in tokens}) > 1
    written = read(answers.with_suffix("") / "1_0.jsonl")
    expected = [question["question_id"] for question in read(place.data / SIX[name].questions)]
    assert [line["question_id"] for line in written] == expected
    summary = finished(place, name, answers)
    assert_same_answers(answers, theirs.answers)
    ways = [{both.pop("asked_by"), both["pins"].pop("asked_by")} for both in (summary, theirs.summary)]
    assert ways == [{"engine"}, {"LLaVA's model_vqa_loader"}] and summary == theirs.summary
    assert summary["protocol"] == "LLaVA's"
    records = (path.parent / "output" / f"{name}.jsonl" for path in (answers, theirs.answers))
    assert next(records).read_bytes() == next(records).read_bytes()


@needs_teacher
def test_a_stopped_run_keeps_its_answers_and_goes_on(place, asked, tmp_path, monkeypatch, capsys):
    answers = tmp_path / "textvqa.jsonl"
    arguments = begun(place, "textvqa", answers, engine=True)
    part = Path(arguments[arguments.index("--answers-file") + 1])
    run = AsLlava.run

    def stopped(self, requests, done, **options):
        def some(number, text):
            if len(read(part)) == 7:  # on the disk already: a kill would leave them, too
                raise KeyboardInterrupt
            done(number, text)

        return run(self, requests, some, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AsLlava, "run", stopped)
        assert main([*arguments, "--batch-size", "4"]) == 130
    assert f"Stopped; {part} holds what was answered" in capsys.readouterr().err
    kept = read(part)
    assert len(kept) == 7
    assert main(begun(place, "textvqa", answers, engine=True)) == 0
    finished(place, "textvqa", answers)
    assert all(entry in read(answers) for entry in kept)  # with their own ids: not asked again
    assert_same_answers(answers, asked["textvqa"].answers)


@needs_teacher
@pytest.mark.long
def test_the_script_asks_through_the_engine_in_two_processes(place, asked, tmp_path, monkeypatch, capfd):
    """And the two ways never mix in one file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("MAX_NEW_TOKENS", "6")
    options = {"conv_mode": "qwen_qa", "devices": [None, None], "model_name": "shared"}
    mine = {**options, "engine": True, "batch_size": 3, "dtype": "float32"}
    summary = run_llava_benchmark("pope", str(place.model), place.data, tmp_path, **mine)
    assert "qwen_qa, in 2 process(es), through the engine" in capfd.readouterr().out
    assert summary["asked_by"] == "engine in float32"
    assert summary["figures"] == asked["pope"].summary["figures"]
    answers = place.data / "pope" / "answers" / "shared.jsonl"
    assert_same_answers(answers, asked["pope"].answers)
    for other, said in (({"dtype": None}, "'engine'"), ({"engine": False}, '"LLaVA\'s model_vqa_loader"')):
        with pytest.raises(DataError, match="pope.sh ended with status 2"):
            run_llava_benchmark("pope", str(place.model), place.data, tmp_path, **{**mine, **other})
        assert f"asked by 'engine in float32', not {said}" in capfd.readouterr().err
    script = ["bash", str(about.folder("scripts") / "eval" / "pope.sh"), str(place.model)]
    done = subprocess.run(
        script, env={**os.environ, "EVAL_DATA": str(place.data), "PYTHON": sys.executable, "ENGINE": "yes"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "ENGINE=yes: must be 1, for the engine, or 0" in done.stderr


@needs_teacher
def test_the_command_hands_its_flags_on(place, tmp_path, monkeypatch):
    asked = {}

    def note(name, model_path, data, output, **options):
        asked[name] = options
        raise DataError("noted")

    monkeypatch.setattr(cli, "run_llava_benchmark", note)
    common = ["--model-path", str(place.model), "--data-root", str(place.data), "--output", str(tmp_path)]
    common += ["--device", "cpu", "--benchmarks", "pope"]
    assert cli.main([*common]) == 1
    assert (asked["pope"]["engine"], asked["pope"]["dtype"]) == (False, None)
    assert cli.main([*common, "--engine", "--batch-size", "5", "--dtype", "float16", "--image-workers", "3"]) == 1
    assert [asked["pope"][name] for name in ("engine", "batch_size", "dtype")] == [True, 5, "float16"]
    assert asked["pope"]["image_workers"] == 3


@needs_teacher
def test_answers_that_do_not_say_what_asked_are_llavas(place, tmp_path, capsys):
    answers = tmp_path / "mme.jsonl"
    begun(place, "mme", answers, engine=False)
    beside = answers.with_name("mme.jsonl.run.json")
    about_it = json.loads(beside.read_text())
    assert about_it.pop("asked_by") == "LLaVA's model_vqa_loader"
    first = read(tmp_path / "mme" / "left.jsonl")[0]
    answer = {"question_id": first["question_id"], "prompt": first["text"], "text": "x"}
    write(tmp_path / "mme" / "1_0.jsonl", [answer])
    beside.write_text(json.dumps(about_it))
    with pytest.raises(AssertionError):
        begun(place, "mme", answers, engine=True)
    assert "asked by \"LLaVA's model_vqa_loader\", not 'engine'. MODEL_NAME=…" in capsys.readouterr().err
    begun(place, "mme", answers, engine=False)
    assert len(read(tmp_path / "mme" / "kept.jsonl")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Random models: long answers, images of many sizes, other rules of decoding
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> SimpleNamespace:
    return make_questions(tmp_path_factory.mktemp("questions"))


def test_long_answers_about_images_of_many_sizes(world, questions, tmp_path):
    def answered(name, **generation):
        model = model_folder(world["siglip"], world["tokenizer"], tmp_path / name, generation=generation)
        return both(model, questions, "qwen_1_5")

    answers = answered("llava-a")
    assert all(len(tokens) == 9 for tokens in answers)
    assert answers[0] == answers[15] != answers[1]  # the same question twice, and another image
    # End tokens are those of the checkpoint's generation config: several, and such as a text may hold.
    first = {tokens[0] for tokens in answers}
    ends = list(dict.fromkeys(token for tokens in answers[::-1] for token in tokens if token not in first))[:2]
    ended = answered("llava-b", eos_token_id=ends)
    assert {tokens[-1] for tokens in ended} >= set(ends) and len({len(tokens) for tokens in ended}) > 1
    assert all(short == whole[: len(short)] for short, whole in zip(ended, answers, strict=True))
    # A penalty changes what is said; the first token stays.
    other = answered("llava-c", repetition_penalty=1.7)
    assert other != answers and [tokens[0] for tokens in other] == [tokens[0] for tokens in answers]


def test_an_image_behind_text_and_between_markers(world, questions, tmp_path):
    model = model_folder(world["siglip"], world["tokenizer"], tmp_path / "llava-m", mm_use_im_start_end=True)
    both(model, questions, "llava_v0", longest=4)


def test_a_prompt_beyond_the_longest_sequence_is_cut_as_llava_cuts_it(world, questions, tmp_path, capsys):
    short = model_folder(world["siglip"], world["tokenizer"], tmp_path / "llava-s", tokenizer_model_max_length=30)
    whole = model_folder(world["siglip"], world["tokenizer"], tmp_path / "llava-w", tokenizer_model_max_length=300)
    # Nine visual tokens, then as much of the question as fits.
    assert both(short, questions, "qwen_qa", 4) != both(whole, questions, "qwen_qa", 4)
    tight = model_folder(world["siglip"], world["tokenizer"], tmp_path / "llava-t", tokenizer_model_max_length=9)
    assert main(flags(tight, questions.path, questions.images, tmp_path / "t.jsonl", "qwen_qa")) == 2
    said = capsys.readouterr().err
    assert "0.png: the image fills the 9 positions of tokenizer_model_max_length" in said


def test_images_cut_into_crops(world, questions, tmp_path):
    grid = [[factory.PIXELS, 2 * factory.PIXELS], [2 * factory.PIXELS, factory.PIXELS]]
    model = model_folder(
        factory.save_tower(tmp_path / "clip", "clip"), world["tokenizer"], tmp_path / "llava-crops",
        image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=grid,
    )  # fmt: skip
    both(model, questions, "qwen_1_5", longest=5)


def test_a_llama_whose_tokenizer_puts_bos_before_a_text(world, questions, tmp_path):
    tokenizer = factory.make_llama_tokenizer(tmp_path / "tokenizer", text="\n".join(PROMPTS) * 20, vocab_size=300)
    model = model_folder(
        world["siglip"], tokenizer, tmp_path / "llava-l", family="llama", generation={"bos_token_id": 1}
    )
    both(model, questions, "v1", family="llama")
