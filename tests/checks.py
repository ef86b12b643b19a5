"""Training runs compared: their logs and their weights."""

from __future__ import annotations

import pytest
import torch

TERMS = ("loss", "lm", "kl", "attention", "attention_similarity")
# Gradients show in the weights as they are: Adam would turn rounding of a zero gradient into a full step, clipping
# would hide a wrong scale.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0}


def assert_same_log(found, expected, tolerance=2e-4):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in TERMS:
            assert (name in ours) == (name in theirs), (name, ours, theirs)
            if name in ours:
                margin = max(tolerance, 1.1e-4) if name == "loss" else tolerance  # transformers 4.37 rounds the loss
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=margin), (name, ours, theirs)


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=0, msg=lambda message, n=name: f"{n}: {message}"
        )


def killed_and_resumed(dft, monkeypatch, **options):
    """Run the fixture `dft` with a checkpoint every second step, killed at the first one, and once more."""
    from llava_compodistill.train.trainer import CompoDistillTrainer

    original = CompoDistillTrainer._save_checkpoint

    class Killed(BaseException):
        pass

    def save_and_die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Killed

    saving = {"save_strategy": "steps", "save_steps": 2, **options}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CompoDistillTrainer, "_save_checkpoint", save_and_die)
        dft("broken", **saving)
    return dft("broken", **saving)


def skip_halves(dtype):
    """Skip the test where this torch multiplies no float16 on a CPU: before 2.2."""
    half = torch.ones(1, 1, dtype=torch.float16)
    try:
        half @ half
    except RuntimeError:
        if dtype is torch.float16:
            pytest.skip("this torch multiplies no float16 on a CPU")
