"""Weights of 8 and 4 bits, by bitsandbytes' kernels for the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from factory import make_batch, make_model
from safetensors.torch import load_file

from llava_compodistill import cli, compat
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.pair.teacher import load_teacher
from llava_compodistill.train.checkpoint import save_whole

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or not compat.QUANTISES_WITHOUT_CUDA,
    reason="needs bitsandbytes and a transformers that uses it without CUDA",
)
LAYOUTS = ["qIqqaaqa", "qIqa", "qqa"]
#: What bitsandbytes holds weights in.
STORED = {8: torch.int8, 4: torch.uint8}


def precisions(model):
    """Of the layers' matrices, and of everything else that has a weight."""
    core = llava_core(model)
    layers = {id(module) for layer in core.get_model().layers for module in layer.modules()}
    linear = [module for module in core.modules() if isinstance(module, torch.nn.Linear)]
    inside = {module.weight.dtype for module in linear if id(module) in layers and module.in_features > 4}
    return inside, {module.weight.dtype for module in linear if id(module) not in layers}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_teaches_about_the_same(dft, bits):
    """Its adapter, encoder and head keep their precision, which losses and the student's encoder share."""
    options = {**PLAIN, "max_steps": 3}
    _, expected = dft("whole", **options)
    trainer, found = dft("quantised", teacher_placement=f"{bits}bit", **options)
    inside, outside = precisions(trainer.objective.teacher)
    assert inside == {STORED[bits]} and not outside & set(STORED.values())
    assert found[0]["lm"] == pytest.approx(expected[0]["lm"], rel=1e-6), "the student is the same"
    for name in ("kl", "attention"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=0.1) and found[0][name] != expected[0][name]


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_of_fewer_bits(siglip, tmp_path, bits):
    """Of a model as wide as bitsandbytes' packed kernels for 4 bits ask for."""
    model, batch = make_model(siglip, hidden=128, dtype=torch.float32), make_batch(LAYOUTS, dtype=torch.float32)
    save_whole(model, str(tmp_path))
    found = []
    for placement in ("replicate", f"{bits}bit"):
        device = torch.device("cpu")
        teacher = load_teacher(str(tmp_path), placement=placement, dtype=torch.float32, device=device)
        with torch.no_grad():
            found.append(teacher(**batch.inputs, use_cache=False).logits.softmax(dim=-1))
    inside, outside = precisions(teacher)
    assert inside == {STORED[bits]} and not outside & set(STORED.values())
    apart = (found[0] - found[1]).abs().max() / found[0].max()
    assert 0 < apart < (0.02 if bits == 8 else 0.2)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_qlora_student_learns_goes_on_and_is_merged(dft, world, tmp_path, monkeypatch, bits):
    options = {"bits": bits, "lora_enable": True, "lora_r": 4, "max_steps": 4}
    unbroken, expected = dft("unbroken", **options)
    base = [module.base_layer.weight for module in unbroken.model.modules() if hasattr(module, "base_layer")]
    assert base and {weight.dtype for weight in base} == {STORED[bits]}
    assert not any(weight.requires_grad for weight in base)
    assert all(line["grad_norm"] > 0 and line["attention"] > 0 for line in expected)
    resumed, found = killed_and_resumed(dft, monkeypatch, **options)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)
    assert cli.main(["merge", str(tmp_path / "unbroken"), str(tmp_path / "merged")]) == 0
    merged, trained = load_file(tmp_path / "merged" / "model.safetensors"), trained_weights(unbroken.model)
    base = load_file(world["qwen-student"] / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    up, down = (
        next(value for key, value in trained.items() if name in key and part in key) for part in ("lora_B", "lora_A")
    )
    scale = unbroken.args.lora_alpha / 4
    expected_weight = base[f"{name}.weight"] + scale * (up.float() @ down.float())
    torch.testing.assert_close(merged[f"{name}.weight"].float(), expected_weight, atol=2e-6, rtol=1e-5)
