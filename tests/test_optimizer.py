"""The optimizer that a stage gets: the one asked for, with every trained weight in it once."""

from __future__ import annotations

import pytest
import torch

from llava_compodistill.train import resume
from llava_compodistill.train.arguments import DataArguments, ModelArguments, TrainingArguments, default_optimizer


def optimizer_of(trainer):
    found = trainer.optimizer
    return getattr(found, "optimizer", found)  # accelerate wraps it


@pytest.mark.parametrize("asked, fused", [("adamw_torch_fused", True), (None, None)])
def test_a_stage_has_the_optimizer_asked_for(dft, asked, fused):
    trainer, _ = dft("run", method="llavadi", optim=asked, max_steps=1)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is fused
    found = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    trained = {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
    assert set(found) == trained and len(found) == len(trained)
    own = {id(weight) for module in trainer.objective.modules.values() for weight in module.parameters()}
    assert own and own <= trained, "the term's map W"
    assert all("exp_avg" in optimizer.state[weight] for group in optimizer.param_groups for weight in group["params"])


def test_the_fused_one_makes_the_same_steps(dft):
    plain, fused = (dft(name, optim=name, max_steps=3)[0] for name in ("adamw_torch", "adamw_torch_fused"))
    theirs = dict(plain.model.named_parameters())
    for name, mine in fused.model.named_parameters():
        # A softmax does not see the keys' bias: its gradient is rounding, which Adam scales up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(mine, theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "gpu, use_cpu, name",
    [(True, False, "adamw_torch_fused"), (True, True, "adamw_torch"), (False, False, "adamw_torch")],
)
def test_the_default_is_the_fastest_there(monkeypatch, gpu, use_cpu, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert default_optimizer(use_cpu) == name
    assert default_optimizer(use_cpu, fp16=True) == "adamw_torch"


def test_a_run_may_go_on_with_the_other_one(tmp_path):
    def describe(name):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", optim=name)
        return resume.describe(ModelArguments(), DataArguments(data_path="none.json"), args)

    plain, fused, default, other = map(describe, ("adamw_torch", "adamw_torch_fused", None, "sgd"))
    assert plain == fused == default
    assert {name for name in plain if plain[name] != other[name]} == {"optim"}
