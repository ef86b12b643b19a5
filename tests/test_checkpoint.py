"""Every kind of checkpoint, through LLaVA's loader and back."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from llava_compodistill.about import __version__
from llava_compodistill.errors import CheckpointError
from llava_compodistill.hosts.llava import register, registration
from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.loader import checkpoint_kind
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.train import checkpoint

register()

from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import get_model_name_from_path  # noqa: E402

BASES = {"qwen": "qwen-student", "llama": "llama"}
KINDS = {"adapter": "dpt", "full": "dft", "lora": "dft"}


@pytest.fixture(scope="session")
def trained(world, teacher_path, tmp_path_factory):
    """(trainer, folder) of a TAF student of a family, saved as a kind of checkpoint; each is trained once."""
    root = tmp_path_factory.mktemp("students")
    made = {}

    def make(family, kind):
        if (family, kind) not in made:
            options = {"model_name_or_path": world[BASES[family]], "teacher_model_path": teacher_path}
            if kind != "adapter":
                options["pretrain_mm_mlp_adapter"] = make(family, "adapter")[1] / "mm_projector.bin"
            if kind == "lora":
                options |= {"lora_enable": True, "lora_r": 4, "learning_rate": 1e-2}
            folder = root / f"llava-{family}-{kind}"
            made[family, kind] = tiny.run(world, KINDS[kind], folder, **options).model.eval(), folder
        return made[family, kind]

    return make


@pytest.fixture(scope="session")
def question(world):
    """Token ids with an image marker, and an image of the world."""
    record = json.loads((world["data"] / "instruct_student.json").read_text())[0]
    from PIL import Image
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor.from_pretrained(world["siglip"])
    with Image.open(world["data"] / "images" / record["image"]) as image:
        pixels = processor.preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return torch.tensor([[20, 30, IMAGE_TOKEN_INDEX, 40, 50, 60]]), pixels


def answer(model, question, dtype=torch.float32):
    """(greedy tokens, logits of the last position)."""
    ids, pixels = question
    model.generation_config.suppress_tokens = None  # the loader's guard, which the model that was saved has not
    with torch.no_grad():
        logits = model(input_ids=ids, images=pixels.to(dtype), use_cache=False).logits[0, -1].float()
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
        # LLaVA's own Llama, with transformers 4.37, asks for a BOS token and puts it before the answer.
        tokens = model.generate(ids, images=pixels.to(dtype), bos_token_id=1, **options)[0].tolist()
    return tokens[-8:], logits


def load(folder, base=None, loader=None, **options):
    loader = loader or import_llava("llava.model.builder").load_pretrained_model
    name = get_model_name_from_path(str(folder))
    return loader(str(folder), base, name, device="cpu", **options)


def fetched(model):
    """P_T's weights in a loaded model."""
    return llava_core(model).get_model().mm_projector.teacher_adapter.state_dict()


def assert_fetched_from(model, teacher_path, dtype=torch.float32):
    teacher = load_file(teacher_path / "model.safetensors")
    state = fetched(model)
    assert len(state) == 4
    for name, value in state.items():
        assert value.dtype == dtype and torch.equal(value, teacher[f"model.mm_projector.{name}"].to(dtype)), name


# ---------------------------------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BASES)
def test_a_checkpoint_answers_as_the_model_that_was_saved(world, teacher_path, trained, question, family, kind):
    saved, folder = trained(family, kind)
    assert checkpoint_kind(str(folder)) == kind
    tokens, logits = answer(llava_core(saved), question)
    base = None if kind == "full" else str(world[BASES[family]])
    tokenizer, loaded, _, _ = load(folder, base)
    assert type(loaded).__name__ == {"qwen": "LlavaQwen2ForCausalLM", "llama": "LlavaLlamaForCausalLM"}[family]
    assert_fetched_from(loaded, teacher_path)
    found_tokens, found = answer(loaded, question)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    assert found_tokens == tokens
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id or kind == "adapter"
    template = {} if kind == "adapter" else {"template": "qwen_1_5"}
    assert loaded.config.compodistill == {
        "method": "compodistill",
        "stage": KINDS[kind],
        "version": __version__,
        **template,
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_stage_moved_what_is_loaded(trained, question, kind):
    """The round trip would also hold for a checkpoint that kept nothing of its training."""
    adapter, folder = trained("qwen", "adapter")
    before = answer(llava_core(adapter), question)[1]
    after = answer(
        load(trained("qwen", kind)[1])[1] if kind == "full" else llava_core(trained("qwen", kind)[0]), question
    )
    assert (after[1] - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_llavas_original_loader_reads_a_llama_student(world, teacher_path, trained, question, kind):
    """Unwrapped LLaVA, registered for the adapter and the tower alone."""
    original = registration._originals["llava.model.builder", "load_pretrained_model"]
    saved, folder = trained("llama", kind)
    base = None if kind == "full" else str(world["llama"])
    _, loaded, processor, _ = load(folder, base, original, device_map="cpu")
    assert type(loaded).__name__ == "LlavaLlamaForCausalLM"
    assert_fetched_from(loaded, teacher_path, torch.float16)
    assert processor.crop_size["height"] == processor.size["height"]
    loaded = loaded.float().eval()
    found = answer(loaded, question)[1]
    expected = answer(llava_core(saved), question)[1]
    # It works in half precision, and cuts the vocabulary's padding off.
    torch.testing.assert_close(found, expected[: len(found)], atol=0.03, rtol=0.03)


def test_a_lora_finds_its_base_by_itself(trained, question):
    saved, folder = trained("qwen", "lora")
    assert answer(load(folder)[1], question)[0] == answer(llava_core(saved), question)[0]


def test_a_lora_that_continues_one_is_complete(world, teacher_path, trained, question, tmp_path):
    _, folder = trained("qwen", "lora")
    model = tiny.run(world, "sft", tmp_path / "llava-next", model_name_or_path=folder, lora_enable=True).model.eval()
    _, loaded, _, _ = load(tmp_path / "llava-next", str(world["qwen-student"]))
    assert_fetched_from(loaded, teacher_path)
    torch.testing.assert_close(
        answer(loaded, question)[1], answer(llava_core(model), question)[1], atol=1e-5, rtol=1e-5
    )


def test_a_lora_keeps_its_weights_in_fp32_on_the_way(world, trained, tmp_path):
    """The base is held in bf16; what is trained is neither saved nor loaded in it."""
    options = {"lora_enable": True, "lora_r": 4, "bf16": True}
    _, folder = trained("qwen", "lora")
    tiny.run(world, "sft", tmp_path / "next", model_name_or_path=folder, learning_rate=0, **options)
    for read, name in ((torch.load, "non_lora_trainables.bin"), (load_file, "adapter_model.safetensors")):
        before, after = read(folder / name), read(tmp_path / "next" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            if "teacher_adapter" in key:
                continue
            assert not torch.equal(value, value.bfloat16().float()), "nothing to lose"
            assert after[key].dtype == torch.float32 and torch.equal(after[key], value), key


@pytest.mark.parametrize("flag, kept", [("lora_r", 4), ("lora_alpha", 16), ("lora_dropout", 0.05)])
def test_a_lora_is_not_continued_as_another_one(world, trained, tmp_path, flag, kept):
    _, folder = trained("qwen", "lora")
    options = {"model_name_or_path": folder, "lora_enable": True, "lora_r": 4, flag: 0.5 if "drop" in flag else 8}
    message = rf"--{flag} {options[flag]}: the LoRA in .* has {'r' if flag == 'lora_r' else flag} {kept}"
    with pytest.raises(CheckpointError, match=message):
        tiny.run(world, "sft", tmp_path / "out", **options)


def test_a_lora_goes_on_without_its_flags(world, trained, tmp_path, caplog):
    _, folder = trained("qwen", "lora")
    caplog.set_level(logging.INFO)
    tiny.run(world, "sft", tmp_path / "out", model_name_or_path=folder, lora_enable=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert "The LoRA keeps its r 4 (not --lora_r 64)" in caplog.text


def test_nothing_frightens_without_cause(world, trained, tmp_path, caplog, recwarn):
    """An adapter that is loaded next is not "newly initialized", and saving a LoRA asks nobody for the base's type."""
    for kind, base in (("lora", None), ("adapter", str(world["qwen-student"]))):
        load(trained("qwen", kind)[1], base)
    tiny.run(world, "sft", tmp_path / "out", model_name_or_path=trained("qwen", "lora")[1], lora_enable=True)
    printed = caplog.text + "".join(str(warning.message) for warning in recwarn)
    for words in ("MISSING", "newly initialized", "to instantiate a model", "assume that the vocabulary"):
        assert words not in printed


def test_weights_that_no_model_has_are_still_reported(world, trained, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(world["qwen-student"], base)
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.layers.9.extra": torch.zeros(1)}, base / "model.safetensors", {"format": "pt"})
    folder = trained("qwen", "adapter")[1]
    transformers_logging.set_verbosity_warning()  # another test may have turned it down
    load(folder, str(base))
    assert "model.layers.9.extra" in caplog.text


def test_a_student_stands_alone(world, trained, question, tmp_path):
    """SFT from DFT needs no teacher and no DPT folder, and neither does loading."""
    folder = tmp_path / "llava-moved"
    shutil.copytree(trained("qwen", "full")[1], folder)
    model = tiny.run(world, "sft", tmp_path / "llava-sft", model_name_or_path=folder).model.eval()
    shutil.rmtree(folder)
    assert answer(load(tmp_path / "llava-sft")[1], question)[0] == answer(llava_core(model), question)[0]


def test_what_a_folder_holds(trained):
    full = {path.name for path in trained("qwen", "full")[1].iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"} <= full
    assert not any("vision_tower" in name for name in load_file(trained("qwen", "full")[1] / "model.safetensors"))
    lora = trained("qwen", "lora")[1]
    assert {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"} <= {
        path.name for path in lora.iterdir()
    }
    extra = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    assert len(extra) == 6 and all(name.startswith("base_model.model.model.mm_projector.") for name in extra)
    adapter = torch.load(trained("qwen", "adapter")[1] / "mm_projector.bin", weights_only=True)
    assert {name.removeprefix("model.mm_projector.") for name in adapter} == {
        *(f"teacher_adapter.{part}.{what}" for part in (0, 2) for what in ("weight", "bias")),
        "student_map.0.weight", "student_map.0.bias",
    }  # fmt: skip
    config = json.loads((trained("qwen", "full")[1] / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2" and config["mm_projector_type"] == "taf" and config["use_cache"]
    assert config["architectures"] == ["LlavaQwen2ForCausalLM"] and config["mm_hidden_size"] and config["use_mm_proj"]
    for key in ("taf_teacher_projector_type", "taf_teacher_hidden_size", "taf_depth", "image_aspect_ratio"):
        assert config[key]


# ---------------------------------------------------------------------------------------------------------------------
# Starting from a checkpoint
# ---------------------------------------------------------------------------------------------------------------------
def test_a_checkpoint_keeps_its_own_vision_settings(world, tmp_path, caplog):
    """LLaVA writes the flags' defaults into the config and goes on with the modules that are there."""
    start = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1}
    tiny.run(world, "sft", tmp_path / "first", **start)
    caplog.set_level(logging.INFO)
    trainer = tiny.run(world, "sft", tmp_path / "second", model_name_or_path=tmp_path / "first")
    core = llava_core(trainer.model)
    assert core.get_vision_tower().select_layer == core.config.mm_vision_select_layer == -1
    assert core.config.mm_projector_type == "mlp2x_gelu"
    assert "keeps its mm_vision_select_layer -1 (not --mm_vision_select_layer -2)" in caplog.text
    assert json.loads((tmp_path / "second" / "config.json").read_text())["mm_vision_select_layer"] == -1


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("adapter", {}, "holds an adapter only: name the language model there.*mm_projector.bin"),
        ("lora", {}, "is a LoRA checkpoint: go on with --lora_enable True"),
        ("full", {"pretrain_mm_mlp_adapter": "FOLDER"}, "is a folder: name the mm_projector.bin in it"),
    ],
)
def test_a_stage_from_the_wrong_kind_of_checkpoint(world, trained, tmp_path, kind, changes, message):
    folder = trained("qwen", kind)[1]
    changes = {name: folder if value == "FOLDER" else value for name, value in changes.items()}
    with pytest.raises(CheckpointError, match=message):
        tiny.run(world, "sft", tmp_path / "out", model_name_or_path=folder, **changes)
    assert not (tmp_path / "out").exists()


def test_an_ordinary_adapter_does_not_pass_for_taf(world, teacher_path, tmp_path):
    adapter = teacher_path.parent / "pt" / "mm_projector.bin"
    with pytest.raises(CheckpointError, match="(?s)mm_projector.bin does not fit the model.*teacher_adapter"):
        tiny.run(
            world, "dft", tmp_path / "out", teacher_model_path=teacher_path, pretrain_mm_mlp_adapter=adapter
        )  # fmt: skip


def test_resuming_refuses_a_folder_of_another_kind(trained):
    lora, full, adapter = (trained("qwen", kind) for kind in ("lora", "full", "adapter"))
    with pytest.raises(CheckpointError, match="holds lora weights, which do not fit a full model"):
        checkpoint.load_into(full[0], str(lora[1]))
    with pytest.raises(CheckpointError, match="holds full weights, which do not fit a LoRA model"):
        checkpoint.load_into(lora[0], str(full[1]))
    with pytest.raises(CheckpointError, match="does not fit the model: missing"):
        checkpoint.load_into(full[0], str(trained("llama", "full")[1]))
    # What fits is loaded: disturb and restore.
    for model, folder in (lora, full, adapter):
        trained_now = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        checkpoint.load_into(model, str(folder))
        for name, parameter in model.named_parameters():
            assert name not in trained_now or torch.equal(parameter, trained_now[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Folders of a killed run, and the disk
# ---------------------------------------------------------------------------------------------------------------------
def test_a_finished_run_that_is_started_again_trains_no_step(world, tmp_path):
    options = {"mm_projector_type": "mlp2x_gelu", "save_strategy": "steps", "save_steps": 2}
    first = tiny.run(world, "pt", tmp_path / "out", **options)
    second = tiny.run(world, "pt", tmp_path / "out", **options)
    assert second.state.global_step == first.state.global_step == 2
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_full_disk_stops_before_training(world, monkeypatch, tmp_path, strategy):
    output = tmp_path / "some" / "folder"
    options = {"mm_projector_type": "mlp2x_gelu", "save_strategy": strategy, "save_total_limit": 2}
    asked = []

    def usage(folder):
        asked.append(str(folder))
        return SimpleNamespace(total=10**9, used=10**9 - 10**5, free=10**5)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        OSError, match=r"(?s)--output_dir .*folder: the checkpoints need about .* GiB and 0\.0 GiB are free.*Free some"
    ):
        tiny.run(world, "sft", output, **options)
    assert not list(tmp_path.rglob("*.safetensors")) and asked[0].startswith(str(tmp_path))


def space_needed(model, args, monkeypatch):
    """The free space, in bytes, from which on the check passes."""
    low, high = -1, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=middle: SimpleNamespace(free=free))
        try:
            checkpoint.check_disk_space(model, args)
            high = middle
        except OSError:
            low = middle
    return high


def space_options(output, **changes):
    values = {"stage": "dft", "save_strategy": "steps", "save_total_limit": 1, "save_only_model": False}
    return SimpleNamespace(output_dir=str(output), **{**values, "deepspeed": None, **changes})


def test_the_space_needed_grows_with_what_is_kept(trained, monkeypatch, tmp_path):
    model = trained("qwen", "full")[0]
    weights = sum(p.numel() * 4 for n, p in model.named_parameters() if "vision_tower" not in n)
    trained_size = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)

    def needed(**changes):
        return space_needed(model, space_options(tmp_path, **changes), monkeypatch)

    assert needed(save_strategy="no") == weights
    assert needed() == weights + 2 * (weights + 2 * trained_size)
    assert needed(save_total_limit=3) == weights + 4 * (weights + 2 * trained_size)
    assert needed(save_only_model=True) == 3 * weights
    assert needed(deepspeed="zero2.json") == weights + 2 * (weights + 3 * trained_size), "ZeRO's fp32 weights"
    model = copy.deepcopy(model)
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert needed() == weights + 2 * (weights + 2 * trained_size)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_the_frozen_adapter_takes_space_too(trained, monkeypatch, tmp_path, kind):
    model = trained("qwen", kind)[0]
    adapter = llava_core(model).get_model().mm_projector
    saved = {*adapter.parameters(), *(p for p in model.parameters() if p.requires_grad)}
    options = space_options(tmp_path, stage=KINDS[kind], save_strategy="no")
    assert space_needed(model, options, monkeypatch) == sum(p.numel() * 4 for p in saved)


def test_what_a_killed_run_has_written_is_not_asked_for_again(trained, monkeypatch, tmp_path):
    model = trained("qwen", "full")[0]
    options = space_options(tmp_path)
    weights = space_needed(model, space_options(tmp_path, save_strategy="no"), monkeypatch)
    before = space_needed(model, options, monkeypatch)
    each = (before - weights) // 2
    for step, size in ((5, each), (10, 100)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(size))
        # Room for the next checkpoint and the result is always asked for.
        assert space_needed(model, options, monkeypatch) == weights + each


def test_a_finished_run_names_what_it_leaves(world, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = {"mm_projector_type": "mlp2x_gelu", "save_strategy": "steps", "save_steps": 2}
    tiny.run(world, "pt", tmp_path / "out", **options)
    assert "checkpoint-2 (0.00 GiB, optimizer state included) stays beside it" in caplog.text
    assert f"rm -r {tmp_path / 'out' / 'checkpoint-2'}" in caplog.text
    caplog.clear()
    tiny.run(world, "pt", tmp_path / "none", **{**options, "save_strategy": "no"})
    assert "rm -r" not in caplog.text
