"""The miniature's stored weights: what is frozen, and what a run gets of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniature import weights

pytestmark = pytest.mark.once


def test_a_run_s_models_are_stored_in_fp16_and_nothing_else_of_the_run(tmp_path):
    for name in weights.FOLDERS:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        save_file({"weight": torch.full((2,), 1 / 3)}, folder / "model.safetensors")
        of_the_run = () if name == "tokenizer" else ("trainer_state.json", "evaluation-test.json")
        for file in ("config.json", "tokenizer.json", *of_the_run):
            (folder / file).write_text('{"mm_vision_tower": "/somewhere/siglip"}')
    weights.store(tmp_path / "models", {"command": "by hand"}, tmp_path / "stored")
    for name in weights.FOLDERS:
        found = sorted(path.name for path in (tmp_path / "stored" / name).iterdir())
        assert found == ["config.json", "model.safetensors", "tokenizer.json"], name
        assert load_file(tmp_path / "stored" / name / "model.safetensors")["weight"].dtype == torch.float16
    config = json.loads((tmp_path / "stored" / "llava-teacher" / "config.json").read_text())
    assert config["mm_vision_tower"] == "siglip"
    assert json.loads((tmp_path / "stored" / "manifest.json").read_text())["command"] == "by hand"


def test_the_stored_weights_are_whole_and_a_run_s_teacher_finds_its_tower(tmp_path):
    manifest = weights.install(tmp_path)
    assert manifest["command"].endswith("--from-scratch")
    for name in weights.FOLDERS:
        stored = {path.name for path in (weights.STORED / name).iterdir()}
        assert not [file for file in stored if file.startswith(weights.OF_A_RUN)]
        assert {path.name for path in (tmp_path / name).iterdir()} == stored
    config = json.loads((tmp_path / "llava-teacher" / "config.json").read_text())
    assert config["mm_vision_tower"] == str((tmp_path / "siglip").resolve())
