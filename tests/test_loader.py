"""LLaVA's loader with the plugin: the right class with every weight, and checkpoints of the wrong kind."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import factory
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.weights import portable_lora_config
from llava_compodistill.pair.teacher import load_teacher

register()

from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import get_model_name_from_path  # noqa: E402

from llava_compodistill.hosts.llava.loader import (  # noqa: E402
    CheckpointError,
    _with_lora,
    checkpoint_kind,
    dispatching_loader,
    find_tower,
    load_extra_weights,
    load_model,
    read_tensors,
    read_tokenizer,
    read_weights,
)


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------
def load(path, base=None, **options):
    loader = import_llava("llava.model.builder").load_pretrained_model
    return loader(str(path), base, get_model_name_from_path(str(path)), device="cpu", **options)


CLASSES = {"qwen2": "LlavaQwen2ForCausalLM", "llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}


@pytest.mark.parametrize("family", CLASSES)
def test_the_loader_gives_the_right_class_with_every_weight(checkpoints, family):
    path = checkpoints[family]
    tokenizer, model, processor, context = load(path)
    assert type(model).__name__ == CLASSES[family] and context == 2048
    saved = load_file(path / "model.safetensors")
    loaded = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    assert model.get_input_embeddings().num_embeddings == 1024 > len(tokenizer), "a padded vocabulary is not shrunk"
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 1024
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {
        p.device.type for p in model.parameters()
    } == {"cpu"}
    assert not model.training and model.get_vision_tower().is_loaded
    assert processor.crop_size["height"] == factory.PIXELS


def test_query_key_and_value_biases_survive(checkpoints):
    saved = load_file(checkpoints["qwen2"] / "model.safetensors")
    _, model, _, _ = load(checkpoints["qwen2"])
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj"):
            bias = getattr(layer.self_attn, part).bias
            name = f"model.layers.{layer.self_attn.layer_idx}.self_attn.{part}.bias"
            assert bias.abs().max() > 0.1 and torch.equal(bias, saved[name])


@pytest.mark.parametrize("name", ["my-lora-model", "mpt-7b", "prompt-tuned", "mistral-like", "plain", "LLaVA-Lora"])
def test_the_folders_name_does_not_matter(checkpoints, tmp_path, name):
    path = tmp_path / name
    path.symlink_to(checkpoints["qwen2"])
    _, model, _, _ = load(path)
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"
    assert model.get_vision_tower().is_loaded


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_loader_honours_dtype(checkpoints, key):
    _, model, _, _ = load(checkpoints["qwen2"], **{key: torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the vision tower too"
    ids = torch.tensor([[IMAGE_TOKEN_INDEX, 5, 6]])
    pixels = torch.zeros(1, 3, factory.PIXELS, factory.PIXELS, dtype=torch.bfloat16)
    assert model(input_ids=ids, images=pixels).logits.dtype in (torch.bfloat16, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_default_device_falls_back_to_the_cpu(checkpoints):
    loader = import_llava("llava.model.builder").load_pretrained_model
    with pytest.warns(UserWarning, match="No CUDA device"):
        _, model, _, _ = loader(str(checkpoints["llama"]), None, "llava-llama")
    assert next(model.parameters()).device.type == "cpu" and next(model.parameters()).dtype == torch.float32


def test_other_model_types_go_to_llavas_own_loader(world, tmp_path):
    calls = []
    loader = dispatching_loader(lambda *args, **kwargs: calls.append((args, kwargs)) or "original")
    assert loader(str(world["qwen-student"]), None, "qwen", device="cpu", device_map="cpu") == "original"
    (tmp_path / "mpt").mkdir()
    (tmp_path / "mpt" / "config.json").write_text(json.dumps({"model_type": "llava_mpt"}))
    assert loader(str(tmp_path / "mpt"), None, "llava-mpt") == "original"
    assert calls[0][0][:3] == (str(world["qwen-student"]), None, "qwen") and calls[0][1]["device"] == "cpu"
    assert len(calls) == 2


def test_a_checkpoint_with_markers_around_its_images_is_evaluated(checkpoints, tmp_path):
    """New runs of the adapter or LoRA refuse them; a model that has learned them keeps them."""
    path = tmp_path / "llava-markers"
    shutil.copytree(checkpoints["qwen2"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "mm_use_im_start_end": True}))
    tokenizer, model, _, _ = load(path)
    markers = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert len(set(markers)) == 2 and max(markers) < model.get_input_embeddings().num_embeddings == 1024


def test_images_change_the_answer_and_generation_works(checkpoints):
    _, model, _, _ = load(checkpoints["qwen2"])
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6, 7]])
    images = torch.rand(2, 1, 3, factory.PIXELS, factory.PIXELS)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    first, second = (model(input_ids=ids, images=pixels).logits for pixels in images)
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-3
    # Greedy decoding, step by step without a cache, from the merged embeddings.
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images[0])[4]
    expected = []
    for _ in range(6):
        token = model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
        expected.append(int(token))
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], dim=1)
    assert model.generate(ids, images=images[0], **options)[0].tolist() == expected
    assert model.generate(ids[:, 2:], **options).shape[1] == 6  # without an image
    with pytest.raises(ValueError, match="not `inputs_embeds`"):
        model.generate(inputs_embeds=embeds)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the wrong kind
# ---------------------------------------------------------------------------------------------------------------------
def test_checkpoint_kinds_and_unfinished_folders(checkpoints, world, dpt_path, tmp_path):
    assert checkpoint_kind(str(checkpoints["llama"])) == "full"
    assert checkpoint_kind(str(world["llama"])) == "base"
    assert checkpoint_kind(str(dpt_path)) == "adapter"
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint_kind(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoint_kind(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights: training may have stopped"):
        checkpoint_kind(str(tmp_path / "empty"))


def test_a_base_model_is_no_teacher(world):
    with pytest.raises(
        CheckpointError, match="--teacher_model_path .*qwen-teacher is a language model without vision"
    ):
        load_teacher(str(world["qwen-teacher"]))


def test_an_adapter_needs_its_language_model(dpt_path, world):
    with pytest.raises(CheckpointError, match="holds an adapter only: name its language model"):
        load_model(str(dpt_path))
    _, model, _, _ = load(dpt_path, str(world["qwen-student"]))
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"


def test_an_adapter_that_does_not_fit_is_refused(checkpoints, tmp_path):
    model = load_model(str(checkpoints["qwen2"]))
    adapter = {name: value.clone() for name, value in model.state_dict().items() if "mm_projector" in name}
    path = str(tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="is missing: the checkpoint is incomplete"):
        load_extra_weights(model, path)
    for wrong, message in (
        ({name: value for name, value in adapter.items() if "bias" not in name}, "missing .*mm_projector.0.bias"),
        ({**adapter, "model.mm_projector.9.weight": torch.zeros(1)}, "unknown .*mm_projector.9.weight"),
        ({name: torch.zeros(3) for name in adapter}, "does not fit the model in config.json.*size mismatch"),
    ):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            load_extra_weights(model, path)
    torch.save({f"base_model.model.{name}": value + 1 for name, value in adapter.items()}, path)
    load_extra_weights(model, path)
    assert torch.equal(model.state_dict()["model.mm_projector.0.bias"], adapter["model.mm_projector.0.bias"] + 1)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD_FOLDER"],))


def test_a_bin_file_cannot_run_code(tmp_path, monkeypatch, checkpoints, dpt_path, world):
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "executed"))
    path = tmp_path / "evil" / "mm_projector.bin"
    shutil.copytree(dpt_path, path.parent)
    torch.save({"model.mm_projector.0.weight": Payload()}, path)
    model = load_model(str(checkpoints["qwen2"]))
    for read in (
        lambda: read_weights(str(path)),
        lambda: load_extra_weights(model, str(path)),
        lambda: load(path.parent, str(world["qwen-student"])),
    ):
        with pytest.raises(Exception, match="(?i)weights.only|refused"):
            read()
    assert not (tmp_path / "executed").exists()


def test_an_unknown_language_model_is_named():
    from llava_compodistill.hosts.llava.language_models import model_class

    with pytest.raises(
        ValueError, match="model_type 'gpt2' in config.json: supported language models are llama, mistral, qwen2"
    ):
        model_class("gpt2")


def test_a_tower_that_has_moved(checkpoints, siglip, tmp_path):
    path = tmp_path / "llava-moved"
    shutil.copytree(checkpoints["qwen2"], path)
    config = json.loads((path / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "gone" / "siglip")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: mm_vision_tower .*gone/siglip is not there"):
        load(path)
    teacher = load_teacher(str(path), vision_tower=str(siglip))
    assert teacher.get_vision_tower().vision_tower_name == teacher.config.mm_vision_tower == str(siglip)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_weights_without_biases_are_noticed(checkpoints, tmp_path):
    """A Qwen checkpoint that lost its biases (loaded and saved as Llama) does not load as if nothing were missing."""
    path = tmp_path / "llava-lost"
    shutil.copytree(checkpoints["qwen2"], path)
    weights = load_file(path / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "_proj.bias" not in n}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="q_proj.bias"):
        load_model(str(path))


def test_biases_that_the_architecture_has_not_are_noticed(checkpoints, tmp_path):
    """A Qwen checkpoint whose config.json says Llama: without its biases it would be another model."""
    path = tmp_path / "llava-other"
    shutil.copytree(checkpoints["qwen2"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llava_llama"}))
    with pytest.raises(CheckpointError, match="weights that a LlavaLlama.* has no place for, such as .*_proj.bias"):
        load_model(str(path))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no pickle"])
def test_a_damaged_file_of_weights_is_named(dpt_path, world, tmp_path, damage):
    path = tmp_path / "damaged" / "mm_projector.bin"
    shutil.copytree(dpt_path, path.parent)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="mm_projector.bin cannot be read"):
        load(path.parent, str(world["qwen-student"]))
    (tmp_path / "adapter_model.safetensors").write_bytes(damage(b"12345678{}"))
    with pytest.raises(CheckpointError, match="adapter_model.safetensors cannot be read"):
        read_tensors(str(tmp_path), "adapter_model")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / "adapter_model.bin").write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="adapter_model.bin cannot be read"):
        _with_lora(torch.nn.Linear(2, 2), str(tmp_path), trainable=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_damaged_language_model_is_named(checkpoints, tmp_path, name):
    folder = tmp_path / "llava-damaged"
    shutil.copytree(checkpoints["qwen2"], folder)
    data = (folder / "model.safetensors").read_bytes()
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        data = (folder / name).read_bytes()
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_tokenizer_is_named(world, tmp_path, content):
    shutil.copytree(world["tokenizer"], tmp_path / "tokenizer")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/tokenizer: its tokenizer cannot be loaded"):
        read_tokenizer(str(tmp_path / "tokenizer"))


def test_a_tower_without_a_name_is_refused():
    with pytest.raises(CheckpointError, match=r"folder/config\.json: mm_vision_tower must be a text, is 5"):
        find_tower(SimpleNamespace(mm_vision_tower=5), "folder", None)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA of other releases of PEFT
# ---------------------------------------------------------------------------------------------------------------------
#: adapter_config.json as PEFT 0.21 writes it.
LORA = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.05,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 3,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": True, "velora_config": None,
}  # fmt: skip


def test_a_lora_of_another_release_of_peft_loads():
    config = portable_lora_config({**LORA, "of_next_year": None}, "adapter_config.json")
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj"})
    assert config.use_rslora and config.lora_dropout == 0.05 and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"of_next_year": True}, r"of_next_year True\. Load it with a newer PEFT"),
        ({"of_next_year": 0.5}, "of_next_year 0.5"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is no LORA"),
        ({"peft_type": None}, "peft_type None is no LORA"),
        ({"loftq_config": 3, "init_lora_weights": "loftq"}, "no LoRA can be made of it"),
    ],
)
def test_a_lora_that_would_be_another_one_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=rf"folder/adapter_config\.json.*{message}"):
        portable_lora_config({**LORA, **changes}, "folder/adapter_config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Code in a checkpoint
# ---------------------------------------------------------------------------------------------------------------------
CODE = """
import os
os.mkdir(os.environ["PAYLOAD_FOLDER"])
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class Config(PretrainedConfig):
    model_type = "llava_evil"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizer):
    pass
"""


def evil(path, model_type, source):
    """A folder whose config, model and tokenizer ask for code that makes a marker when it is imported."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    (path / "code.py").write_text(CODE)
    return path


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Where the code leaves its marker; whoever is asked for consent gives it."""
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "executed"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "executed"


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("name", ["prompt-tuned-7b", "llava-mpt-7b", "llava-lora", "plain"])
@pytest.mark.parametrize("model_type", ["llava_evil", "evil", "llava_mpt", "qwen2", "llava_qwen2"])
def test_a_folder_with_code_is_refused(checkpoints, world, marker, tmp_path, model_type, name, base):
    path = evil(tmp_path / name, model_type, checkpoints["qwen2"])
    with pytest.raises(CheckpointError, match="auto_map|is no LLaVA model"):
        load(path, str(world["qwen-student"]) if base else None)
    assert not marker.exists()


def test_training_does_not_run_code_either(checkpoints, siglip, marker, tmp_path):
    from llava_compodistill.hosts.llava.loader import read_tokenizer
    from llava_compodistill.hosts.llava.vision_towers import is_siglip

    path = str(evil(tmp_path / "teacher", "llava_evil", checkpoints["qwen2"]))
    for read in (load_teacher, load_model, read_tokenizer):
        with pytest.raises(CheckpointError, match="auto_map"):
            read(path)
    with pytest.raises(CheckpointError, match="auto_map"):
        is_siglip(str(evil(tmp_path / "tower", "evil", siglip)))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["prompt-tuned-7b", "llava-like"])
def test_a_name_that_makes_llavas_loader_trust_is_refused(world, tmp_path, name):
    """ "mpt" in it: remote code; "llava": LlavaLlama whatever the type, and pickles beside a base model."""
    calls = []
    loader = dispatching_loader(lambda *args, **kwargs: calls.append(args))
    (tmp_path / name).symlink_to(world["qwen-student"])
    with pytest.raises(CheckpointError, match="Rename the folder|'qwen2' in its config.json is no LLaVA model"):
        loader(str(tmp_path / name), None, name, device="cpu")
    assert not calls
