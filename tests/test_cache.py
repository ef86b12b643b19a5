"""A teacher cache, made by the command and trained from through the real entry point."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_compodistill.errors import (
    CacheError,
    CheckpointError,
    CompoDistillError,
    DiskError,
    FlagError,
    NonFiniteModelError,
    OutputError,
)
from llava_compodistill.hosts.base import MergedBatch
from llava_compodistill.hosts.llava.adapters import read_adapter
from llava_compodistill.hosts.llava.model import llava_core, projector
from llava_compodistill.train.cache import cli, entries, make, read, settings, shards, size
from llava_compodistill.train.cache.read import TeacherCache
from llava_compodistill.train.run import main as train
from scale import modes

DFT = {"mm_projector_type": "mlp2x_gelu", "student_layers": "1,2,3", "teacher_layers": "1,2,3,4"}
EXACT = ("--top_k", "9999", "--logit_bits", "32", "--map_bits", "32")


@pytest.fixture(autouse=True)
def loading_a_teacher_draws_nothing(monkeypatch):
    """transformers 4.37 draws the weights that it then loads; the student's new ones would be others without it."""
    from llava_compodistill.train import run

    original = run.load_teacher

    def load(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            return original(*args, **kwargs)

    monkeypatch.setattr(run, "load_teacher", load)


@pytest.fixture(scope="module")
def of_dft(world, sharp_teacher, mixed):
    """What a DFT stage on the mixed data has beside its defaults."""
    return {"teacher_model_path": sharp_teacher, "data_path": mixed, **DFT}


def flags(world, stage, **values):
    return tiny.flags(world, stage, "unused", **values)


def make_cache(world, folder, stage, *options, **values):
    assert cli.main(["--output", str(folder), *options, *flags(world, stage, **values)]) == 0
    return folder


@pytest.fixture(scope="module")
def exact(world, of_dft, tmp_path_factory):
    """A cache of the mixed data that holds all there is, in shards of five samples."""
    return make_cache(
        world, tmp_path_factory.mktemp("cache") / "exact", "dft", *EXACT, "--shard_samples", "5", **of_dft
    )


@pytest.fixture(scope="module")
def small(world, of_dft, tmp_path_factory):
    """A cache in few bits."""
    options = ("--top_k", "8", "--logit_bits", "8", "--map_bits", "8")
    return make_cache(world, tmp_path_factory.mktemp("cache") / "small", "dft", *options, **of_dft)


# ---------------------------------------------------------------------------------------------------------------------
# Training from it
# ---------------------------------------------------------------------------------------------------------------------
def test_dft_from_an_exact_cache_is_dft_with_the_teacher(dft, exact):
    """Also in another order and other micro-batches than the cache was made in; and no teacher is in memory."""
    options = {**PLAIN, "max_steps": 4, "seed": 3}
    live, expected = dft("live", **options)
    assert expected[0]["attention"] > 0.01 and expected[0]["kl"] > 0.01, "too alike to test anything"
    cached, found = dft("cached", teacher_cache=exact, **options)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(cached.model), trained_weights(live.model), 1e-5)
    assert cached.objective.teacher is None and live.objective.teacher is not None
    count = sum(p.numel() for p in llava_core(cached.model).parameters())
    reachable = {id(p): p.numel() for m in (cached.model, cached.objective.pair.student) for p in m.parameters()}
    assert sum(reachable.values()) == count
    assert not isinstance(cached.objective.pair.teacher, torch.nn.Module)
    parts, found = dft(
        "parts", teacher_cache=exact, per_device_train_batch_size=1, gradient_accumulation_steps=2, **options
    )
    assert_same_log(found, expected, 2e-5)
    assert_same_weights(trained_weights(parts.model), trained_weights(live.model), 2e-5)


def test_a_step_in_bf16_takes_a_teacher_in_bf16(world, dft, of_dft, exact, tmp_path):
    """What a teacher in bf16 rounds is in its cache; one made in float32 differs from it by that rounding."""
    options = {**PLAIN, "max_steps": 3, "bf16": True}
    rounded = make_cache(world, tmp_path / "bf16", "dft", *EXACT, **of_dft, bf16=True)
    _, live = dft("live", **options)
    _, found = dft("rounded", teacher_cache=rounded, **options)
    assert_same_log(found, live, 2e-3)  # a sample has others beside it here than where the cache was made
    _, whole = dft("whole", teacher_cache=exact, **options)
    assert_same_log(whole, live, 1e-2)
    for part in ("kl", "attention"):
        apart, without = (abs(log[0][part] - live[0][part]) for log in (found, whole))
        assert apart < without / 2 and apart < 5e-4 * live[0][part]


def test_packs_from_a_cache_are_packs_with_the_teacher(dft, exact):
    """A pack holds samples that the cache has at other places, some of them without an image."""
    options = {**PLAIN, "max_steps": 3, "pack_length": 200, "per_device_train_batch_size": 1}
    live, expected = dft("live", **options)
    cached, found = dft("cached", teacher_cache=exact, **options)
    assert len(live.train_dataset) < 16
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(cached.model), trained_weights(live.model), 1e-5)


def test_dft_from_few_bits_is_close(dft, small):
    options = {**PLAIN, "max_steps": 4, "group_by_modality_length": True, "dataloader_num_workers": 1}
    live, expected = dft("live", **options)
    cached, found = dft("cached", teacher_cache=small, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["lm"] == pytest.approx(theirs["lm"], rel=2e-2)
        assert mine["attention"] == pytest.approx(theirs["attention"], rel=2e-2)
        assert mine["kl"] < theirs["kl"], "fewer outcomes diverge less"
    assert found[0]["kl"] != expected[0]["kl"]
    start = 0
    for name, value in trained_weights(live.model).items():
        start = max(start, (value - trained_weights(cached.model)[name]).abs().max().item())
    assert 0 < start < 5e-2


def test_dpt_fetches_the_adapter_alone(world, teacher_path, tmp_path, monkeypatch):
    """P_T comes bit for bit from the teacher's checkpoint, and nothing else of it is loaded."""
    values = {"teacher_model_path": teacher_path, **PLAIN, "max_steps": 3}
    cache = make_cache(world, tmp_path / "cache", "dpt", *EXACT, **values)
    live = tiny.run(world, "dpt", tmp_path / "live", **values)
    monkeypatch.setattr("llava_compodistill.train.run.load_teacher", None)
    cached = tiny.run(world, "dpt", tmp_path / "cached", teacher_cache=cache, **values)
    assert_same_log(tiny.read_log(tmp_path / "cached"), tiny.read_log(tmp_path / "live"), 1e-5)
    assert_same_weights(trained_weights(cached.model), trained_weights(live.model), 1e-5)
    fetched = projector(cached.model).teacher_adapter
    assert not any(parameter.requires_grad for parameter in fetched.parameters())
    weights = load_file(teacher_path / "model.safetensors")
    for part, value in fetched.state_dict().items():
        assert torch.equal(value, weights[f"model.mm_projector.{part}"])
    base = load_file(world["qwen-student"] / "model.safetensors")
    state = llava_core(cached.model).state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items()), "the language model is frozen"


def test_the_adapter_of_any_checkpoint(teacher_path, tmp_path):
    """In one file, in shards, as an adapter alone; and of none."""
    whole = read_adapter(str(teacher_path)).state_dict()
    weights = load_file(teacher_path / "model.safetensors")
    parts = {"model-1-of-2.safetensors": {}, "model-2-of-2.safetensors": {}}
    for number, (name, value) in enumerate(weights.items()):
        parts[list(parts)[number % 2]][name] = value
    folders = [tmp_path / name for name in ("sharded", "adapter", "none")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(teacher_path / "config.json", folder)
    for name, part in parts.items():
        save_file(part, folders[0] / name)
    places = {weight: name for name, part in parts.items() for weight in part}
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    adapter = {name: value for name, value in weights.items() if "mm_projector" in name}
    torch.save(adapter, folders[1] / "mm_projector.bin")
    for folder in folders[:2]:
        found = read_adapter(str(folder), torch.float32).state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    save_file(
        {name: value for name, value in weights.items() if name not in adapter}, folders[2] / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="none has no weights of an adapter"):
        read_adapter(str(folders[2]))
    with pytest.raises(CheckpointError, match="org/name: the teacher's adapter is read from a folder"):
        read_adapter("org/name")


def test_padding_s_token_in_a_text(dft, world, of_dft, mixed, tmp_path):
    """LLaVA leaves it out, wherever it is."""
    samples = json.loads(mixed.read_text())
    samples[0]["conversations"][0]["value"] += " say <|endoftext|> now"
    samples[1]["conversations"][1]["value"] = "it is <|endoftext|> red"
    data = tmp_path / "padded.json"
    data.write_text(json.dumps(samples))
    cache = make_cache(world, tmp_path / "cache", "dft", *EXACT, **{**of_dft, "data_path": data})
    options = {**PLAIN, "max_steps": 2, "per_device_train_batch_size": 8, "data_path": data}
    live, expected = dft("live", **options)
    assert live.train_dataset.tokenizer.pad_token == "<|endoftext|>"
    _, found = dft("cached", teacher_cache=cache, **options)
    assert_same_log(found, expected, 1e-5)


def test_few_shards_are_open_at_a_time(dft, exact, monkeypatch):
    opened, original = [], read.Shard

    def note(*args):
        opened.append(args[0].name)
        return original(*args)

    monkeypatch.setattr(read, "Shard", note)
    monkeypatch.setattr(read, "_OPEN", 1)
    options = {**PLAIN, "max_steps": 2}
    _, found = dft("cached", teacher_cache=exact, **options)
    assert len(opened) > 4 + len(set(opened))
    monkeypatch.undo()
    _, expected = dft("all", teacher_cache=exact, **options)
    assert found == expected


def test_a_run_is_not_resumed_from_a_cache_made_otherwise(dft, world, of_dft, small, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(small, cache)
    options = {"teacher_cache": cache, "save_strategy": "steps", "save_steps": 1}
    dft("run", max_steps=1, **options)
    shutil.rmtree(cache)
    make_cache(world, cache, "dft", "--top_k", "4", **of_dft)
    with pytest.raises(CompoDistillError, match="teacher_cache_made"):
        dft("run", max_steps=2, **options)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_killed_run_goes_on_as_the_unbroken_one(dft, small, monkeypatch, trained):
    options = {"teacher_cache": small, "max_steps": 4}
    if trained == "lora":
        options |= {"lora_enable": True, "lora_r": 4}
    whole, expected = dft("whole", **options)
    broken, found = killed_and_resumed(dft, monkeypatch, **options)
    assert found == expected or [e["loss"] for e in found] == [e["loss"] for e in expected]
    for name, value in trained_weights(whole.model).items():
        assert torch.equal(value, trained_weights(broken.model)[name]), name


def test_a_run_reads_what_it_needs_alone(dft, exact, monkeypatch):
    """Logit distillation from the cache of a run with maps; fewer groups than there are."""
    read, original = set(), shards.Shard._part

    def note(self, name, *places):
        read.add(name)
        return original(self, name, *places)

    monkeypatch.setattr(shards.Shard, "_part", note)
    _, expected = dft("live", vat=False, **PLAIN)
    _, found = dft("cached", vat=False, teacher_cache=exact, **PLAIN)
    assert_same_log(found, expected, 1e-5)
    assert read and not any(name.startswith("map") for name in read)
    fewer = {"student_layers": "2,3", "teacher_layers": "2,3,4"}  # groups 2-3 and 3-4
    _, expected = dft("live-fewer", **fewer, **PLAIN)
    _, found = dft("cached-fewer", teacher_cache=exact, **fewer, **PLAIN)
    assert_same_log(found, expected, 1e-5)
    assert {name.split(".")[1] for name in read if name.startswith("map")} == {"2-3", "3-4"}


def test_students_of_two_depths_share_a_cache(dft, world, of_dft, tmp_path):
    deeper = tmp_path / "deeper"
    shutil.copytree(world["qwen-student"], deeper)
    config = json.loads((deeper / "config.json").read_text())
    config["num_hidden_layers"] = 5
    config.pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config))
    layers = {"student_layers": "all", "teacher_layers": "all"}  # of 4, 5 and 6 layers
    values = {**of_dft, **layers}
    one = make.prepare(make.Options("none"), flags(world, "dft", **values))
    two = make.prepare(make.Options("none", also_for=(str(deeper),)), flags(world, "dft", **values))
    assert one.what.groups == ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5))
    assert set(two.what.groups) == {*one.what.groups, (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)}
    cache = make_cache(world, tmp_path / "cache", "dft", *EXACT, "--also_for", str(deeper), **values)
    _, expected = dft("live", **layers, **PLAIN)
    _, found = dft("cached", teacher_cache=cache, **layers, **PLAIN)
    assert_same_log(found, expected, 1e-5)


def test_a_cache_of_all_rows_serves_answer_rows(dft, exact):
    options = {**PLAIN, "attention_rows": "answer"}
    _, expected = dft("live", **options)
    _, found = dft("cached", teacher_cache=exact, **options)
    assert_same_log(found, expected, 1e-5)


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
@pytest.mark.long
def test_two_processes_train_from_it_as_one_does_with_the_teacher(
    ranks, dft, world, of_dft, dpt_path, exact, tmp_path, mode
):
    """DeepSpeed, too, gives the batch's float32 to the loss as it is stored."""
    if modes.missing(mode):
        pytest.skip(modes.missing(mode))
    adapter = {"mm_projector_type": "taf", "pretrain_mm_mlp_adapter": dpt_path / "mm_projector.bin"}
    options = {**PLAIN, **adapter, "max_steps": 3}
    _, expected = dft("one", gradient_accumulation_steps=2, **options)
    values = {**of_dft, **options, "teacher_cache": exact, **modes.flags(mode, tmp_path)}
    ranks.train_well(tiny.flags(world, "dft", tmp_path / "two", **values), 2, tmp_path / "log", modes.prelude(mode))
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit is named
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "v1"}, r"--version\): \"qwen_1_5\" there, \"v1\" in this command"),
        ({"model_max_length": 256}, r"--model_max_length: 512 there, 256 in this command"),
        ({"kd_temperature": 2.0}, r"--kd_temperature: 1.0 there, 2.0 in this command"),
        ({"teacher_layers": "2,3,4,5"}, r"groups of teacher layers"),
        ({"image_aspect_ratio": "pad"}, r"--image_aspect_ratio: \"square\" there, \"pad\" in this command"),
        ({"shuffle_attention_targets": True}, "another sample's map at this one's rows"),
        ({"on_policy": 0.5}, "the teacher reads answers that the student gives as it trains"),
        ({"visual_advantage": "tokens"}, r"advantage \(.*without the image"),
        ({"attention_heads": "matched"}, r"attention \(looks at the teacher before training"),
        ({"layer_matching": "adaptive"}, r"looks at the teacher before training: .*--layer_matching adaptive"),
        ({"student_layers": "sight"}, r"looks at the teacher before training: .*--student_layers sight"),
        ({"method": "llavadi"}, "its hidden states"),
        ({"teacher_placement": "replicate"}, "no teacher is loaded: leave --teacher_placement replicate out"),
        ({"teacher_dtype": "float8"}, "no teacher is loaded: leave --teacher_dtype float8 out"),
        ({"vat": "False", "stage": "sft", "teacher_model_path": None}, "no teacher is in the loss of --stage sft"),
    ],
)  # fmt: skip
def test_a_run_that_the_cache_is_not_for_is_refused_before_anything_is_loaded(
    world, of_dft, small, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("llava_compodistill.train.run.build_student", None)
    values = {**of_dft, "teacher_cache": small, **changes}
    stage = values.pop("stage", "dft")
    with pytest.raises(CompoDistillError, match=message):
        train(tiny.flags(world, stage, tmp_path / "out", **values))


def test_another_teacher_is_named(world, of_dft, small, teacher_path, tmp_path):
    values = {**of_dft, "teacher_cache": small, "teacher_model_path": teacher_path}
    with pytest.raises(CacheError, match=r"the teacher's weights or its config: .*model.safetensors"):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))
    moved = tmp_path / "moved"
    shutil.copytree(of_dft["teacher_model_path"], moved)
    trainer = train(tiny.flags(world, "dft", tmp_path / "out", **{**values, "teacher_model_path": moved}))
    assert trainer.state.global_step == 2, "the same teacher in another folder"
    # Changed in its place: one tensor in the middle of its file, or how its config reads it.
    weights, config = moved / "model.safetensors", moved / "config.json"
    tensors, plain = load_file(weights), json.loads(config.read_text())
    with safe_open(weights, "np") as file:
        metadata = file.metadata()
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, weights, metadata)
    with pytest.raises(CacheError, match=r"the teacher's weights or its config: .*model.safetensors"):
        train(tiny.flags(world, "dft", tmp_path / "changed", **{**values, "teacher_model_path": moved}))
    save_file(tensors, weights, metadata)
    config.write_text(json.dumps({**plain, "rms_norm_eps": 1e-4}))
    with pytest.raises(CacheError, match=r"the teacher's weights or its config: .*config.json"):
        train(tiny.flags(world, "dft", tmp_path / "changed", **{**values, "teacher_model_path": moved}))
    config.write_text(json.dumps({**plain, "transformers_version": "4.0.0"}))
    read_by = TeacherCache(str(small), json.loads((small / shards.SETTINGS_FILE).read_text())["settings"])
    assert settings._fingerprint(str(moved)) == {
        name: value for name, value in read_by.settings["teacher_files"].items() if not name.startswith("base/")
    }


def test_another_base_is_named(small):
    """Of an adapter on a language model from the hub, which has no files here."""
    there = json.loads((small / shards.SETTINGS_FILE).read_text())["settings"]
    settings.refuse_unfit(small, {**there, "base": "hub/one"}, {**there, "base": "hub/one"})
    with pytest.raises(CacheError, match=r"--teacher_model_base\): \"hub/one\" there, \"hub/other\" in this command"):
        settings.refuse_unfit(small, {**there, "base": "hub/one"}, {**there, "base": "hub/other"})


def changed_data(mixed, folder, change):
    samples = json.loads(mixed.read_text())
    change(samples)
    path = folder / "changed.json"
    path.write_text(json.dumps(samples))
    return path


def swap(samples):
    samples[1], samples[2] = samples[2], samples[1]


def answer_otherwise(samples):
    samples[2]["conversations"][1]["value"] = "Green"


def look_elsewhere(samples):
    samples[2]["image"] = samples[3]["image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"sample 'sample-\d' \(number [12], image .*tokens or labels"),
        (answer_otherwise, r"sample 'sample-2' \(number 2, image .*Its tokens or labels .* differ"),
        (look_elsewhere, r"sample 'sample-2' \(number 2, image .*Its pixels .* differ"),
        (list.pop, r"the number of samples \(--data_path\): 16 there, 15 in this command"),
    ],
)
def test_other_data_are_named_sample_by_sample(world, of_dft, small, mixed, tmp_path, change, message):
    data = changed_data(mixed, tmp_path, change)
    values = {**of_dft, "teacher_cache": small, "data_path": data, "max_steps": 8, "bad_samples": "skip"}
    with pytest.raises(CacheError, match=message):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))


def test_an_unfinished_or_torn_cache_is_named(world, of_dft, exact, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(exact, torn)
    shard = torn / shards.shard_name(5, 10)
    shard.write_bytes(shard.read_bytes()[:-1])
    values = {**of_dft, "teacher_cache": torn}
    with pytest.raises(
        CacheError, match=r"00000005-00000010.safetensors is damaged \(\d+ bytes of \d+\).*command again"
    ):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))
    index = json.loads((torn / shards.INDEX_FILE).read_text())
    whole = dict(index["shards"])
    del index["shards"][shard.name]
    (torn / shards.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CacheError, match="its shards do not hold its 16 samples"):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))
    (torn / shards.INDEX_FILE).write_text(json.dumps({"shards": {**whole, shard.name: {"start": 0}}}))
    with pytest.raises(CacheError, match="index.json is damaged"):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))
    (torn / shards.INDEX_FILE).unlink()
    with pytest.raises(CacheError, match="is not finished"):
        train(tiny.flags(world, "dft", tmp_path / "out", **values))
    settings = json.loads((torn / shards.SETTINGS_FILE).read_text())
    for name, value in (("groups", [1]), ("top_k", "64"), ("teacher_files", None)):
        broken = {**settings, "settings": {**settings["settings"], name: value}}
        (torn / shards.SETTINGS_FILE).write_text(json.dumps(broken))
        with pytest.raises(CacheError, match=rf"cache.json is damaged \({name}"):
            train(tiny.flags(world, "dft", tmp_path / "out", **values))
    with pytest.raises(CacheError, match="holds no teacher cache"):
        train(tiny.flags(world, "dft", tmp_path / "out", **{**values, "teacher_cache": tmp_path}))


# ---------------------------------------------------------------------------------------------------------------------
# Making it
# ---------------------------------------------------------------------------------------------------------------------
def stored(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_command_that_is_stopped_goes_on(world, of_dft, exact, tmp_path, monkeypatch):
    """After a kill between two shards, a torn shard, and another process' share: equal bytes."""
    folder, values = tmp_path / "cache", ("--shard_samples", "5")
    original, written = shards.write_shard, []

    class Killed(BaseException):
        pass

    def write_and_die(*args):
        if written:
            raise Killed
        written.append(original(*args))
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "write_shard", write_and_die)
        make_cache(world, folder, "dft", *EXACT, *values, **of_dft)
    assert {path.name for path in folder.iterdir()} == {"cache.json", written[0].name}
    (folder / "00000005-00000010.123.tmp").write_bytes(b"of a process that was killed")
    torn = folder / shards.shard_name(10, 15)
    torn.write_bytes((exact / torn.name).read_bytes()[:-3])
    first = written[0].stat().st_mtime_ns
    make_cache(world, folder, "dft", *EXACT, **of_dft)  # the size of a shard is the one that it was begun with
    assert stored(folder) == stored(exact)
    assert written[0].stat().st_mtime_ns == first, "what is whole is kept"

    (folder / "index.json").write_text("{")
    make_cache(world, folder, "dft", *EXACT, **of_dft)
    assert stored(folder) == stored(exact), "only the index was damaged"

    torn.write_bytes(torn.read_bytes()[:-3] + b"123")  # as large as it was
    monkeypatch.setattr(make, "load", refuse_to_run := lambda job: pytest.fail("there is nothing to do"))
    with pytest.raises(pytest.fail.Exception):
        make_cache(world, folder, "dft", *EXACT, **of_dft)
    assert refuse_to_run and not (folder / "index.json").exists() and not torn.exists()


def test_a_folder_that_a_machine_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "SHOWN_AFTER", 0.1)
    with pytest.raises(OutputError, match="is not the first machine's folder on rank 3: name one that all share"):
        make.wait_for(tmp_path, 3)


@pytest.mark.long
def test_two_processes_make_what_one_makes(ranks, world, of_dft, exact, tmp_path):
    """Each writes shards of its own, in batches of one size: equal bytes."""
    folder = tmp_path / "cache"
    command = ["--output", str(folder), *EXACT, "--shard_samples", "5"]
    command += flags(world, "dft", **of_dft, ddp_backend="gloo")
    code = f"from llava_compodistill.train.cache import cli\nassert cli.main({command!r}) == 0\n"
    done = ranks.python(code, tmp_path / "log", processes=2)
    assert done.ok, done.text[-4000:]
    first, second = ((tmp_path / f"log.{rank}").read_text().count("samples, ") for rank in (0, 1))
    assert first and second, "one process has done all the work"
    assert stored(folder) == stored(exact)
    # What the first process finds wrong ends both.
    done = ranks.python(code.replace("9999", "9"), tmp_path / "log", processes=2)
    assert done.statuses == [1, 1] and done.text.count("--top_k: 646 there, 9 in this command") == 2


def test_a_finished_cache_loads_no_teacher(world, of_dft, small, monkeypatch, capsys):
    monkeypatch.setattr(make, "load", lambda job: pytest.fail("there is nothing to do"))
    before = stored(small)
    make_cache(world, small, "dft", "--top_k", "8", **of_dft)
    assert stored(small) == before
    printed = capsys.readouterr().out
    assert "16 samples" in printed and "--map_bits 4" in printed and "--attention_rows answer" in printed


def test_the_size_is_printed_before_and_close_to_what_is_made(world, of_dft, small, tmp_path, capsys):
    """Of a command as a script prints it, launcher and all."""
    pasted = ["python", "-m", "llava_compodistill.train", *flags(world, "dft", **of_dft, deepspeed="zero2.json")]
    own = ["--output", str(tmp_path / "none"), "--top_k", "8", "--estimate", "--also_for", str(world["qwen-student"])]
    assert cli.main([*own, *pasted]) == 0
    assert not (tmp_path / "none").exists()
    job = make.prepare(make.Options("none", top_k=8), flags(world, "dft", **of_dft))
    told = size.mean_bytes(size.measure(job), job.what).total * len(job.dataset)
    made = sum(path.stat().st_size for path in small.glob("*.safetensors"))
    header = 4096
    assert 0.6 * told < made < told + header
    assert size.readable(size.mean_bytes(size.measure(job), job.what).total) in capsys.readouterr().out


def test_other_settings_are_refused_and_nothing_is_lost(world, of_dft, small):
    before = stored(small)
    with pytest.raises(CacheError, match=r"--map_bits: 8 there, 4 in this command") as error:
        make_cache(world, small, "dft", "--top_k", "16", "--map_bits", "4", **of_dft)
    assert "--top_k: 8 there, 16 in this command" in str(error.value)
    with pytest.raises(CacheError, match=r"--attention_rows: \"all\" there, \"answer\" in this command"):
        make_cache(world, small, "dft", "--top_k", "8", **of_dft, attention_rows="answer")
    assert stored(small) == before


def test_a_cache_goes_on_where_there_is_room_for_the_rest(world, of_dft, exact, tmp_path, monkeypatch):
    """What is there does not count, nor is it estimated again."""
    folder, usage = tmp_path / "cache", shutil.disk_usage(tmp_path)
    shutil.copytree(exact, folder)
    shard = folder / shards.shard_name(5, 10)
    least = shard.stat().st_size
    shard.unlink()
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage._replace(free=int(1.5 * least)))
    make_cache(world, folder, "dft", *EXACT, **of_dft)
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage._replace(free=0))
    make_cache(world, folder, "dft", *EXACT, **of_dft)  # nothing is to be made
    assert stored(folder) == stored(exact)
    shard.unlink()
    with pytest.raises(DiskError, match="the cache needs about .* more, and 0 B are free"):
        make_cache(world, folder, "dft", *EXACT, **of_dft)


def test_a_cache_does_not_go_on_with_other_data(world, of_dft, exact, mixed, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(exact, folder)
    (folder / shards.shard_name(10, 15)).unlink()
    before = stored(folder)

    def first(samples):
        samples[0]["conversations"][1]["value"] = "Green"

    def picture(samples):
        samples[5]["image"] = next(s["image"] for s in samples[6:] if "image" in s)

    data = changed_data(mixed, tmp_path, first)
    with pytest.raises(CacheError, match=r"a cache of other data: sample 'sample-0' .*tokens or labels .* differ"):
        make_cache(world, folder, "dft", *EXACT, **{**of_dft, "data_path": data})
    assert "image" in json.loads(mixed.read_text())[5]
    data = changed_data(mixed, tmp_path, picture)
    with pytest.raises(CacheError, match=r"a cache of other data: sample 'sample-5' .*Its pixels .* differ"):
        make_cache(world, folder, "dft", *EXACT, **{**of_dft, "data_path": data})
    assert stored(folder) == {name: content for name, content in before.items() if name != shards.INDEX_FILE}


def test_there_are_shards_for_all_processes(world, of_dft, tmp_path, monkeypatch):
    job = make.prepare(make.Options(str(tmp_path)), flags(world, "dft", **of_dft))
    for count, blocks in ((1, 1), (2, 16)):
        monkeypatch.setattr(type(job.args), "world_size", property(lambda self, count=count: count))
        shutil.rmtree(tmp_path / str(count), ignore_errors=True)
        (tmp_path / str(count)).mkdir()
        todo, every = make.begin(job, size.measure(job), tmp_path / str(count))
        assert len(todo) == len(every) == blocks


def test_a_full_disk_is_said_before_and_while_it_fills(world, of_dft, tmp_path, monkeypatch):
    folder, options = tmp_path / "cache", ("--shard_samples", "5")
    usage = shutil.disk_usage(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskError, match=r"the cache needs about .* more, and 1 kB are"),
    ):
        patch.setattr(size.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        make_cache(world, folder, "dft", **of_dft)
    original, written = shards.save_file, []

    def fill_up(tensors, path):
        original(tensors, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="goes on with the shards that are there"):
        patch.setattr(shards, "save_file", fill_up)
        make_cache(world, folder, "dft", *options, **of_dft)
    assert {path.name for path in folder.iterdir()} == {"cache.json", shards.shard_name(0, 5)}
    make_cache(world, folder, "dft", *options, **of_dft)
    assert (folder / "index.json").is_file()


def test_a_folder_that_another_command_fills_is_refused(world, of_dft, small):
    from llava_compodistill.train.lock import locked

    with locked(str(small)), pytest.raises(OutputError, match=r"--output .*another run is writing to it \(process"):
        make_cache(world, small, "dft", "--top_k", "8", **of_dft)


def test_a_teacher_that_is_not_finite_is_named_with_its_samples(world, of_dft, tmp_path, monkeypatch):
    def broken(found, what):
        raise FloatingPointError("the teacher's log-probabilities are NaN or infinite")

    monkeypatch.setattr(make, "make_entries", broken)
    with pytest.raises(NonFiniteModelError, match=r"NaN or infinite in the batch of sample 'sample-\d+' \(number"):
        make_cache(world, tmp_path / "cache", "dft", **of_dft)


def test_bad_samples_are_left_out_of_it_and_stay_out(world, of_dft, mixed, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world["data"] / "images", images)
    sample = next(s for s in json.loads(mixed.read_text()) if "image" in s)
    picture = images / sample["image"]
    good = picture.read_bytes()
    picture.write_bytes(good[:40])
    values = {**of_dft, "image_folder": images}
    with pytest.raises(CompoDistillError, match=f"sample '{sample['id']}'.*cannot be read as an image"):
        make_cache(world, tmp_path / "cache", "dft", **values)
    values |= {"bad_samples": "skip"}
    cache = make_cache(world, tmp_path / "cache", "dft", **values)
    options = {**values, "teacher_cache": cache, "max_steps": 8}
    assert train(tiny.flags(world, "dft", tmp_path / "out", **options)).state.global_step == 8
    picture.write_bytes(good)
    with pytest.raises(
        CacheError, match=f"sample '{sample['id']}' .*could not be read when the cache was made.*same.*command again"
    ):
        train(tiny.flags(world, "dft", tmp_path / "again", **options))
    cache = make_cache(world, tmp_path / "cache", "dft", **values)
    assert train(tiny.flags(world, "dft", tmp_path / "again", **options)).state.global_step == 8


def test_a_language_model_is_no_teacher(world, of_dft, tmp_path):
    values = {**of_dft, "teacher_model_path": world["qwen-teacher"]}
    with pytest.raises(CompoDistillError, match="qwen-teacher is a language model without vision: give a LLaVA"):
        make_cache(world, tmp_path / "cache", "dft", **values)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_batch_without_an_answer(bits):
    """As when all its samples are cut before their answers."""
    what = entries.What(True, 3, bits, 1.0, 50)
    stored = {8: np.uint8, 16: np.uint16, 32: np.float32}[bits]
    kinds = {"tokens": np.uint16, "codes": stored, "ends": np.float32, "rest": np.float32}
    entry = {"sizes": np.array([0, 5, 0]), **{f"top.{name}": np.zeros(0, kind) for name, kind in kinds.items()}}
    batch = MergedBatch(torch.full((1, 5), -100), torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 0, dtype=int))
    top = entries.read_pass(entries.collate([entries.as_tensors(entry, what)]), batch, what).top.top
    assert top.tokens.shape == top.log_probs.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft", "teacher_model_path": None}, "cache: no teacher is in the loss of --stage sft"),
        ({"on_policy": 0.5}, "cache: with --on_policy 0.5"),
        ({"attention_heads": "matched"}, "cache: a cache holds .*looks at the teacher"),
        ({"teacher_cache": "x"}, "cache: --teacher_cache x is for training"),
    ],
)
def test_what_no_cache_is_for_is_refused(world, of_dft, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(make, "load", None)
    values = {**of_dft, **changes}
    stage = values.pop("stage", "dft")
    with pytest.raises(FlagError, match=message):
        make_cache(world, tmp_path / "cache", stage, **values)
    assert not (tmp_path / "cache").exists()


def test_help_and_bad_options(capsys):
    assert cli.main(["--output", "x"]) == 2
    assert "torchrun --nproc_per_node 8 -m llava_compodistill.cli cache" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--output", "x", "--top_k", "0", "--stage", "dft"])
    assert "--top_k 0: must be at least 1" in capsys.readouterr().err
