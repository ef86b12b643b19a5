"""Stages that go on from a checkpoint under ZeRO-3, where `from_pretrained` has partitioned every weight already."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights
from safetensors.torch import load_file
from test_distributed import parallel_flags

from llava_compodistill.train import resume
from scale import modes

pytestmark = [
    pytest.mark.invariant,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def train(ranks, flags, folder):
    """Under ZeRO-3; what the ranks print."""
    done = ranks.train(flags, 2, folder / "log", modes.prelude("zero3"))
    assert done.ok, done.text[-6000:]
    return done.text


@pytest.mark.long
def test_a_stage_goes_on_from_a_lora_checkpoint(ranks, dft, world, dpt_path, teacher_path, mixed, tmp_path):
    """The adapter takes the checkpoint's weights, and its frozen part is known as the teacher's."""
    lora = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "teacher_model_path": teacher_path}
    lora |= {"mm_projector_type": "taf", "pretrain_mm_mlp_adapter": dpt_path / "mm_projector.bin"}
    dft("first", learning_rate=1e-2, **lora)
    lora |= {"model_name_or_path": tmp_path / "first", "pretrain_mm_mlp_adapter": None, "max_steps": 2, **PLAIN}
    _, expected = dft("one", **lora)
    lora |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    flags = parallel_flags(world, teacher_path, mixed, tmp_path / "two", **{**lora, **modes.flags("zero3", tmp_path)})
    printed = train(ranks, flags, tmp_path)
    assert "the encoder and teacher adapter run once a batch for both models" in printed
    assert "does not match this teacher's" not in printed
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-4)
    one, two = (torch.load(tmp_path / name / "non_lora_trainables.bin") for name in ("one", "two"))
    assert_same_weights(two, one, 1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert_same_weights(two, one, 1e-4)
    # Its checkpoints are known as whole, and as torn.
    assert resume.last_complete(str(tmp_path / "two")) == str(tmp_path / "two" / "checkpoint-2")
    states = next((tmp_path / "two" / "checkpoint-2").glob("global_step*/*rank_1*.pt"))
    states.write_bytes(states.read_bytes()[:1000])
    assert resume.last_complete(str(tmp_path / "two")) == str(tmp_path / "two" / "checkpoint-1")


@pytest.mark.once
@pytest.mark.long
def test_experts_are_made_before_their_weights_are_split(ranks, dft, world, sharp_teacher, mixed, tmp_path):
    """And every rank meets all of them in every step, whatever its tokens choose."""
    # Every rank draws for itself: where all experts are chosen, that decides nothing.
    options = {"method": "llava_mod", "method_options": '{"choices": 4}', "per_device_train_batch_size": 1, **PLAIN}
    dft("dense", stage="d2d", **options)
    options |= {"model_name_or_path": tmp_path / "dense", "max_steps": 2}
    _, expected = dft("one", stage="d2s", gradient_accumulation_steps=2, **options)
    options |= {"teacher_model_path": sharp_teacher, "mm_projector_type": "mlp2x_gelu", "data_path": mixed}
    train(ranks, tiny.flags(world, "d2s", tmp_path / "two", **{**options, **modes.flags("zero3", tmp_path)}), tmp_path)
    log = tiny.read_log(tmp_path / "two")
    assert_same_log(log, expected, 2e-4)
    assert [entry["balance"] for entry in log] == pytest.approx([entry["balance"] for entry in expected], rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_same_weights({name: two[name] for name in one}, one, 1e-4)
