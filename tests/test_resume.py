"""A run that was killed and resumed equals one that was not."""

from __future__ import annotations

import json

import pytest
from checks import assert_same_log, assert_same_weights, trained_weights

from llava_compodistill.train import checkpoint
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant


class Killed(BaseException):
    pass


RUNS = {
    "adapter": {"stage": "dpt", "mm_projector_type": "taf"},
    "full": {},
    "full-grouped": {"group_by_modality_length": True},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1},
    "lora-grouped": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "group_by_modality_length": True},
}


@pytest.mark.parametrize(
    "kind, killed_at", [("adapter", 10), ("full", 4), ("full-grouped", 10), ("lora", 10), ("lora-grouped", 4)]
)
def test_a_resumed_run_equals_an_unbroken_one(dft, world, monkeypatch, tmp_path, kind, killed_at):
    """8 steps an epoch, 12 steps in all, killed before or after the boundary."""
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, **RUNS[kind]}
    if kind == "adapter":
        records = json.loads((world["data"] / "pretrain.json").read_text())[:16]
        options["data_path"] = tmp_path / "captions.json"
        options["data_path"].write_text(json.dumps(records))
    unbroken, expected = dft("unbroken", **options)
    assert len(expected) == 12

    original = CompoDistillTrainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Killed

    saving = {"save_strategy": "steps", "save_steps": killed_at, **options}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CompoDistillTrainer, "_save_checkpoint", save_and_die)
        dft("broken", **saving)
    assert checkpoint.last_complete(str(tmp_path / "broken")).endswith(f"checkpoint-{killed_at}")
    resumed, found = dft("broken", **saving)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)
