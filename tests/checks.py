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
