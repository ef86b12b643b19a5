"""Checkpoints that can be read and are none that a model can be made of: each is an error that names the file."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_compodistill.errors import CheckpointError
from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.host import import_llava

register()

from llava_compodistill.hosts.llava import weights  # noqa: E402
from llava_compodistill.hosts.llava.loader import (  # noqa: E402
    find_tower,
    load_extra_weights,
    load_model,
    read_tensors,
    read_weights,
)
from llava_compodistill.hosts.llava.vision_towers import is_siglip  # noqa: E402
from llava_compodistill.hosts.llava.weights import loading, refuse_broken_weights  # noqa: E402


@pytest.fixture
def full(checkpoints, tmp_path):
    path = tmp_path / "llava-full"
    shutil.copytree(checkpoints["qwen2"], path)
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------------------
# NaN and infinite weights
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_of_broken_weights_is_refused(full, value):
    found = load_file(full / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(found, full / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"llava-full: model\.layers\.1\.mlp\.up_proj\.weight holds values that"):
        load_model(str(full))


def test_a_value_that_the_precision_has_not_is_refused(full):
    from llava_compodistill import compat

    found = load_file(full / "model.safetensors")
    found["lm_head.weight"][0, 0] = 1e30
    save_file(found, full / "model.safetensors", metadata={"format": "pt"})
    load_model(str(full))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds .* infinite \(in float16\)"):
        load_model(str(full), **compat.dtype_argument(torch.float16))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_lora_of_broken_weights_is_refused(tmp_path, name):
    found = {"good": torch.ones(3), "lora_A.weight": torch.tensor([0.0, float("nan")])}
    (save_file if name.endswith("safetensors") else torch.save)(found, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: lora_A\.weight holds values that are NaN"):
        read_tensors(str(tmp_path), "adapter_model")


def test_an_adapter_of_broken_weights_is_refused(tmp_path):
    torch.save({"mm_projector.weight": torch.full((2, 2), float("inf"))}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin: mm_projector\.weight holds values"):
        load_extra_weights(torch.nn.Linear(2, 2), str(tmp_path / "mm_projector.bin"))


def test_every_value_is_looked_at_and_what_is_none_is_not(monkeypatch):
    monkeypatch.setattr(weights, "_AT_ONCE", 4)
    sound = {
        "whole": torch.arange(3),
        "of 8 bits": torch.zeros(3, dtype=torch.uint8),
        "elsewhere": torch.empty(3, device="meta"),
        "partitioned": torch.empty(0),
        "half": torch.ones(9, dtype=torch.bfloat16, requires_grad=True),
    }
    refuse_broken_weights(sound.items(), "here")
    for place in range(9):
        broken = torch.ones(3, 3)
        broken.view(-1)[place] = float("nan")
        with pytest.raises(CheckpointError, match="here: w holds"):
            refuse_broken_weights([("w", broken.t())], "here")


# ---------------------------------------------------------------------------------------------------------------------
# Files of another kind
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({"a": torch.ones(2), "b": "text"}, "'b' is a str"),
        ({1: torch.ones(2)}, "other names"),
    ],
)
def test_a_file_that_holds_no_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=rf"mm_projector\.bin must hold weights by their names.*{message}"):
        read_weights(str(tmp_path / "mm_projector.bin"))


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "{"])
def test_a_generation_config_that_is_none(full, content):
    (full / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_model(str(full))


def test_what_transformers_stumbles_over_is_named_with_its_folder(tmp_path):
    with (
        pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be loaded \(AttributeError: no such"),
        loading(str(tmp_path)),
    ):
        raise AttributeError("no such")
    for kind in (MemoryError, ImportError, torch.cuda.OutOfMemoryError):  # the machine's, not the folder's
        with pytest.raises(kind), loading(str(tmp_path)):
            raise kind("lacks")
    with pytest.raises(OSError, match="offline"), loading("owner/name"):  # on the hub
        raise OSError("offline")


def test_an_adapter_names_its_own_config_where_the_language_model_does_not_fit(dpt_path, world, tmp_path):
    shutil.copytree(dpt_path, tmp_path / "dpt")
    edit(tmp_path / "dpt" / "config.json", hidden_act="no-such")
    with pytest.raises(CheckpointError, match=r"qwen-student.* as .*dpt/config\.json describes it \(KeyError: 'no-s"):
        load_model(str(tmp_path / "dpt"), str(world["qwen-student"]))


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------
def test_llavas_loader_says_when_a_checkpoint_names_no_tower(full):
    config = json.loads((full / "config.json").read_text())
    del config["mm_vision_tower"]
    (full / "config.json").write_text(json.dumps(config))
    loader = import_llava("llava.model.builder").load_pretrained_model
    with pytest.raises(CheckpointError, match=r"config\.json: it names no mm_vision_tower"):
        loader(str(full), None, "llava-full", device="cpu")


def test_a_folder_that_is_no_tower_is_refused(full, siglip, tmp_path):
    edit(full / "config.json", mm_vision_tower=str(full))
    with pytest.raises(CheckpointError, match=r"config\.json: mm_vision_tower .* no vision tower .*'llava_qwen2'"):
        load_model(str(full))
    with pytest.raises(CheckpointError, match="the vision tower .*llava-full holds no vision tower"):
        is_siglip(str(full))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json: there is no such file"):
        find_tower(SimpleNamespace(mm_vision_tower=str(tmp_path / "empty")), "folder", None)
    find_tower(SimpleNamespace(mm_vision_tower=str(siglip)), "folder", None)
