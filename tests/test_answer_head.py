"""Heads that are no plain linear layer, against what the model itself computes with them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from llava_compodistill.record.head import dense_head
from llava_compodistill.record.patch import replaced


class Quantised(nn.Module):
    """Stands for a quantised layer: no weight of floating point to read, a product to ask for."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).t()


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6)
        self.lm_head = nn.Linear(6, 11, bias=bias)

    def forward(self, x):
        return self.lm_head(self.body(x))


def lora_head(bias=False):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)
    model = peft.get_peft_model(Model(bias), config).base_model.model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()  # B starts at 0
    return model.lm_head


def trained_copy():
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["lm_head"])
    head = peft.get_peft_model(Model(), config).base_model.model.lm_head
    with torch.no_grad():
        next(p for p in head.parameters() if p.requires_grad).mul_(2)
    return head


HEADS = {
    "plain": lambda: Model().lm_head,
    "plain with bias": lambda: Model(True).lm_head,
    "lora": lora_head,
    "lora with bias": lambda: lora_head(True),
    "modules_to_save": trained_copy,
    "quantised": lambda: Quantised(Model().lm_head),
}


@pytest.mark.parametrize("kind", HEADS)
def test_weight_bias_and_gradients_are_the_heads_own(kind):
    head = HEADS[kind]().train()
    twin = copy.deepcopy(head).eval()  # no dropout
    hidden = torch.randn(4, 6)
    weight, bias = dense_head(head, hidden)
    assert head.training
    outputs = nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(outputs, twin(hidden))
    trained = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    assert bool(trained) == (kind != "quantised")
    if not trained:
        return
    upstream = torch.randn_like(outputs)
    (outputs * upstream).sum().backward()
    (twin(hidden) * upstream).sum().backward()
    gradients = dict(twin.named_parameters())
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_what_stood_in_the_heads_place_is_asked_while_its_forward_is_replaced():
    """PEFT's wrapper, or a hook that accelerate has hung on the instance."""
    head = lora_head().eval()
    hidden = torch.randn(4, 6)
    plain, calls = head.forward, []
    head.forward = lambda x: calls.append(len(x)) or plain(x)
    expected = head(hidden)
    run = head.forward
    with replaced(head, "forward", lambda hidden: pytest.fail("called itself")):
        torch.testing.assert_close(hidden @ dense_head(head, hidden, run)[0].t(), expected)
    assert head.forward is run and len(calls) > 1, "what stood on the instance stands there again, and was used"
