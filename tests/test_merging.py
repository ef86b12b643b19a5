"""`llava-compodistill merge`: the merged checkpoint is the LoRA student, and nothing is written where it cannot be."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections import namedtuple

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_compodistill import cli
from llava_compodistill.errors import CheckpointError, DiskError
from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.loader import checkpoint_kind
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.train import merging
from llava_compodistill.train.merging import merge
from miniature import language_models

LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "max_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def student(world, teacher_path, dpt_path, tmp_path_factory):
    """(model, folder): a LoRA student with TAF, unmerged."""
    folder = tmp_path_factory.mktemp("lora") / "llava-lora"
    options = {"teacher_model_path": teacher_path, "pretrain_mm_mlp_adapter": dpt_path / "mm_projector.bin"}
    model = tiny.run(world, "dft", folder, **LORA, **options).model.eval()
    (folder / "calibration.json").write_text('{"kept": true}')
    return model, folder


def logits(model):
    torch.manual_seed(0)
    ids, pixels = torch.tensor([[20, 30, -200, 40, 50, 60]]), torch.randn(1, 3, 64, 64)
    tower = llava_core(model).get_vision_tower()
    size = tower.config.image_size
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size))
    with torch.no_grad():
        return llava_core(model)(input_ids=ids, images=pixels, use_cache=False).logits[0].float()


def load(folder):
    loader = import_llava("llava.model.builder").load_pretrained_model
    return loader(str(folder), None, "llava-merged", device="cpu", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def merged(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "llava-whole"
    assert cli.main(["merge", str(student[1]), str(folder)]) == 0
    return folder


def test_the_merged_model_is_the_student(student, merged):
    model, folder = student
    assert checkpoint_kind(str(merged)) == "full"
    tokenizer, loaded, _, _ = load(merged)
    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 1e-3, "the LoRA does something"
    # TAF's adapter, frozen part included, to the last bit; and how it came about.
    names = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    saved = load_file(merged / "model.safetensors")
    assert sum("teacher_adapter" in name for name in names) == 4
    for name, value in names.items():
        assert torch.equal(saved[name.removeprefix("base_model.model.")], value), name
    for name in ("calibration.json", "compodistill_run.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, merged))
    assert after["compodistill"] == before["compodistill"]
    assert not any("lora" in name or "vision_tower" in name for name in saved)
    assert tokenizer.eos_token_id == loaded.generation_config.eos_token_id
    assert [path.name for path in merged.parent.iterdir()] == ["llava-whole"], "nothing else is left"


def test_in_another_precision(student, tmp_path):
    merge(str(student[1]), str(tmp_path / "half"), dtype="bfloat16")
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # Rounded once: the sum is that of float32.
    exact = llava_core(student[0]).get_model().layers[0].mlp.down_proj
    expected = exact.base_layer.weight + exact.get_delta_weight("default")
    assert torch.equal(saved["model.layers.0.mlp.down_proj.weight"], expected.to(torch.bfloat16))


def changed(folder, tmp_path, file, **entries):
    """A copy of a checkpoint with other entries in a JSON file."""
    copy = tmp_path / "llava-copy"
    if not copy.exists():
        shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, **entries}))
    return copy


def test_adapters_of_other_releases_of_peft(student, merged, tmp_path):
    """Entries that the installed one lacks, and weights in a pickle."""
    newer = {"peft_version": "9.0", "of_a_newer_release": None, "qalora_group_size": 16, "another_one": False}
    copy = changed(student[1], tmp_path, "adapter_config.json", **newer)
    torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    merge(str(copy), str(tmp_path / "whole"))
    saved, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", merged))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    changed(student[1], tmp_path, "adapter_config.json", use_something_new=True)
    with pytest.raises(CheckpointError, match="does not know: use_something_new True. Load it with a newer"):
        merge(str(copy), str(tmp_path / "again"))
    changed(student[1], tmp_path, "adapter_config.json", peft_type="LOHA", use_something_new=False)
    with pytest.raises(CheckpointError, match="'LOHA' is no LORA"):
        merge(str(copy), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_a_qlora_is_merged_into_the_unquantised_model(student, merged, tmp_path):
    """LLaVA writes into config.json how it held the language model in training."""
    bits = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    copy = changed(student[1], tmp_path, "config.json", quantization_config=bits)
    merge(str(copy), str(tmp_path / "whole"))
    saved, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", merged))
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_a_students_config_does_not_say_how_its_base_was_held(student, tmp_path):
    from llava_compodistill.train import checkpoint

    core = llava_core(student[0])
    core.config.quantization_config = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    try:
        checkpoint._save_config(core, str(tmp_path))
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert core.config.quantization_config["load_in_4bit"]
    finally:
        del core.config.quantization_config


def test_tied_embeddings_and_a_vocabulary_that_has_grown(world, tmp_path):
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world["qwen-student"])
    config = language_models.qwen2_config(tiny.STUDENT, tokenizer)
    config.tie_word_embeddings, config.vocab_size = True, len(tokenizer)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "tied")
    for file in world["qwen-student"].glob("*"):
        if not file.name.startswith(("model", "config")):
            shutil.copy(file, tmp_path / "tied")
    options = {"model_name_or_path": tmp_path / "tied", "mm_projector_type": "linear", "mm_use_im_patch_token": True}
    model = tiny.run(world, "sft", tmp_path / "lora", **LORA, **options).model.eval()
    merge(str(tmp_path / "lora"), str(tmp_path / "whole"))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["vocab_size"] == len(tokenizer) + 1
    _, loaded, _, _ = load(tmp_path / "whole")
    assert loaded.lm_head.weight is loaded.get_model().embed_tokens.weight
    known = len(tokenizer)
    torch.testing.assert_close(logits(loaded)[:, :known], logits(model)[:, :known], atol=1e-5, rtol=1e-5)
    # The row that nothing was learned about is the mean of the others, not one that could win.
    weight = loaded.lm_head.weight
    torch.testing.assert_close(weight[known], weight[:known].mean(dim=0), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
def test_nothing_is_written_over(student, merged, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in merged.iterdir()}
    assert cli.main(["merge", str(student[1]), str(merged)]) == 2
    assert f"{merged} is there already" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in merged.iterdir()} == before


@pytest.mark.parametrize("kind, message", [("merged", "a whole model already"), ("dpt_path", "an adapter alone")])
def test_what_is_no_lora(request, tmp_path, kind, message):
    with pytest.raises(CheckpointError, match=f"{message}: there is no LoRA to merge"):
        merge(str(request.getfixturevalue(kind)), str(tmp_path / "whole"))


def test_a_base_that_is_not_there(student, dpt_path, merged, tmp_path):
    copy = changed(student[1], tmp_path, "adapter_config.json", base_model_name_or_path="/gone/qwen")
    with pytest.raises(CheckpointError, match="base_model_name_or_path: /gone/qwen is not there: .* with --base"):
        merge(str(copy), str(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match="--base ./nowhere is not there"):
        merge(str(copy), str(tmp_path / "whole"), base="./nowhere")
    with pytest.raises(CheckpointError, match="holds an adapter itself"):
        merge(str(copy), str(tmp_path / "whole"), base=str(dpt_path))
    changed(student[1], tmp_path, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="is empty: name the language model"):
        merge(str(copy), str(tmp_path / "whole"))
    quantised = changed(merged, tmp_path / "q", "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="is stored quantised: name the unquantised"):
        merge(str(copy), str(tmp_path / "whole"), base=str(quantised))
    assert not (tmp_path / "whole").exists()


def test_another_language_model_than_it_was_trained_on(student, world, tmp_path):
    with pytest.raises(
        CheckpointError, match="do not make a model|lacks|does not fit|no place for|that of another model"
    ):
        merge(str(student[1]), str(tmp_path / "whole"), base=str(world["qwen-teacher"]))
    assert list(tmp_path.iterdir()) == []


def test_a_lora_of_a_tied_head_is_refused(student, tmp_path):
    from safetensors.torch import save_file

    copy = changed(student[1], tmp_path, "config.json", tie_word_embeddings=True)
    weights = load_file(copy / "adapter_model.safetensors")
    name = "base_model.model.lm_head.lora_A.weight"
    save_file({**weights, name: torch.zeros(4, 8)}, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"the LoRA changes {name}"):
        merge(str(copy), str(tmp_path / "whole"))


def test_a_disk_without_room(student, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(DiskError, match="the merged model needs .* GiB and 0.00 GiB are free"):
        merge(str(student[1]), str(tmp_path / "whole"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(student, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.manifest, "flush", full)
    with pytest.raises(DiskError, match="cannot be written: .*No space left"):
        merge(str(student[1]), str(tmp_path / "whole"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_safetensors_is_explained(student, tmp_path, monkeypatch):
    """Its error is no OSError, and has the number in its text alone."""

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(merging.checkpoint, "save_whole", full)
    with pytest.raises(DiskError, match="cannot be written: No space left .*: nothing of this one is left"):
        merge(str(student[1]), str(tmp_path / "whole"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_has_left_is_removed(student, tmp_path, caplog):
    host = socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, others, running = (
        tmp_path / f".whole.merging-{name}" for name in (f"{host}-{gone.pid}", f"elsewhere-{gone.pid}", f"{host}-1")
    )
    for folder in (left, others, running):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    merge(str(student[1]), str(tmp_path / "whole"))
    assert not left.exists() and others.exists() and running.exists()
    assert "which a merge that was killed has left" in caplog.text
