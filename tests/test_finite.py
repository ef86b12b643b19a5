"""Nothing that is not finite is saved, and no good checkpoint gives way to it."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from llava_compodistill.errors import NonFiniteLossError
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant


@pytest.fixture
def poisoned_gradient(monkeypatch):
    """Make one gradient NaN in a step, after the loss, which stays finite."""

    def poison(step):
        original = CompoDistillTrainer.training_step

        def training_step(self, model, *args, **kwargs):
            loss = original(self, model, *args, **kwargs)
            if self.state.global_step == step - 1:
                llava_core(model).model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.nan
            return loss

        monkeypatch.setattr(CompoDistillTrainer, "training_step", training_step)

    return poison


def is_finite(path):
    return all(value.isfinite().all() for value in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("limit", [0, 1.0])
def test_a_gradient_that_is_not_finite_in_a_saving_step_leaves_the_good_checkpoint(
    dft, tmp_path, poisoned_gradient, limit
):
    poisoned_gradient(4)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 100}
    with pytest.raises(NonFiniteLossError, match="step 4.*not finite.*Checkpoints in .* are untouched"):
        dft(max_grad_norm=limit, **options)
    assert [path.name for path in (tmp_path / "dft").glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_finite(tmp_path / "dft" / "checkpoint-2")


def test_a_gradient_that_is_not_finite_in_the_last_step_saves_no_model(dft, tmp_path, poisoned_gradient):
    poisoned_gradient(2)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        dft(max_steps=2, logging_steps=100, max_grad_norm=0)
    assert not (tmp_path / "dft" / "model.safetensors").exists()


def test_a_loss_between_two_logs_is_named_with_its_step(dft, monkeypatch):
    original = CompoDistillTrainer.training_step

    def poison(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                llava_core(model).lm_head.weight.fill_(math.nan)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(CompoDistillTrainer, "training_step", poison)
    with pytest.raises(NonFiniteLossError, match="Step 3: the loss terms lm, kl became nan"):
        dft(max_steps=6, logging_steps=4)


def test_an_evaluation_that_is_not_finite_is_named(dft):
    trainer, _ = dft(max_steps=1)
    with torch.no_grad():
        llava_core(trainer.model).lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="the loss terms lm, kl became nan"):
        trainer.evaluate(trainer.train_dataset)


def test_uninitialised_padding_of_a_partitioned_weight_is_no_fault(monkeypatch):
    """ZeRO-3 cuts 10 numbers into parts of 3, of which the last holds one."""
    from llava_compodistill.train import finite

    part = torch.tensor([1.0, math.nan, math.inf])
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_tensor, weight.ds_numel, weight.ds_process_group = part, 10, None
    for rank, good in ((3, True), (2, False)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        assert bool(finite._is_finite(weight)) == good


def test_a_run_with_nothing_left_says_so_and_returns_like_any_other(dft, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first, _ = dft(**options)
    again, _ = dft(**options)
    result = again.train(resume_from_checkpoint=str(tmp_path / "dft" / "checkpoint-2"))
    assert result.global_step == 2 and result.metrics == {}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.38"), reason="this Trainer does not log the gradients' norm"
)
def test_a_gradient_that_is_not_finite_is_named_where_it_is_logged(dft, poisoned_gradient):
    poisoned_gradient(2)
    with pytest.raises(NonFiniteLossError, match="Step 2: the norm of the gradients became nan"):
        dft(max_steps=4, logging_steps=1, max_grad_norm=1.0)
