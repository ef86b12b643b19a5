"""Layers with experts: routing and gradients token by token, upcycling, and what a checkpoint keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from factory import checkpoint_folder, make_batch, make_model
from torch import nn

from llava_compodistill.hosts.llava import experts as experts_module
from llava_compodistill.hosts.llava.experts import Experts, Router, SparseMLP, routers
from llava_compodistill.hosts.llava.language_models import upcycle


class _Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 7)
        self.down = nn.Linear(7, config.hidden_size)

    def forward(self, states):
        return self.down(F.silu(self.up(states)))


class _Config:
    hidden_size = 5


def routed_by_hand(network, tokens, settings, noise):
    """One sample, token by token: output, balance and the share of dropped choices."""
    tokens_count, count = len(tokens), settings.count
    capacity = math.ceil(tokens_count * settings.choices / count * settings.capacity_factor)
    logits = tokens @ network.router.weight.t()
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = []
    for token in range(tokens_count):
        order = [max(range(count), key=lambda e, t=token: probabilities[t, e].item())]
        while len(order) < settings.choices:
            left = [e for e in range(count) if e not in order]
            order.append(max(left, key=lambda e, t=token: (logits[t, e] + noise[t, e]).item()))
        chosen.append(order)
    load, kept = [0] * count, set()
    for choice in range(settings.choices):
        for token in range(tokens_count):
            expert = chosen[token][choice]
            load[expert] += 1
            if not network.training or load[expert] <= capacity:
                kept.add((token, expert))
    outputs = []
    for token in range(tokens_count):
        mine = [expert for expert in chosen[token] if (token, expert) in kept]
        total = sum(probabilities[token, expert] for expert in mine)
        parts = [probabilities[token, e] / total * network.experts[e](tokens[token]) for e in mine]
        outputs.append(sum(parts) if parts else torch.zeros_like(tokens[token]))
    first = [sum(order[0] == e for order in chosen) / tokens_count for e in range(count)]
    balance = sum(probabilities[:, e].mean() * first[e] for e in range(count)) / count * count**2
    return torch.stack(outputs), balance, 1 - len(kept) / (tokens_count * settings.choices)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count, choices, factor", [(4, 2, 1.5), (4, 2, 0.6), (3, 2, 1.0), (5, 3, 0.8)])
def test_experts_against_token_by_token(monkeypatch, training, count, choices, factor):
    """Three samples of unlike lengths, each by itself."""
    settings = Experts((0,), count, choices, factor)
    network = SparseMLP(_Config, _Expert, settings).train(training)
    hidden = torch.randn(3, 9, 5, requires_grad=True)
    lengths = (9, 4, 7)
    network.router.real = torch.arange(9) < torch.tensor(lengths)[:, None]
    noise = torch.randn(3, 9, count)
    monkeypatch.setattr(experts_module, "_gumbel", lambda like: noise)
    found = []
    network.router.register_forward_hook(lambda module, args, routing: found.append(routing))
    output = network(hidden)
    total = wanted = 0.0
    for sample, length in enumerate(lengths):
        own = noise[sample] if training else torch.zeros_like(noise[sample])
        expected, balance, dropped = routed_by_hand(network, hidden[sample, :length], settings, own)
        torch.testing.assert_close(output[sample, :length], expected, atol=2e-6, rtol=1e-5)
        assert not output[sample, length:].any()
        assert found[0].balance[sample].item() == pytest.approx(balance.item(), rel=1e-5)
        assert found[0].dropped[sample].item() == pytest.approx(dropped, abs=1e-6)
        assert training or dropped == 0
        target = torch.randn_like(expected)
        total = total + (output[sample, :length] * target).sum() + found[0].balance[sample]
        wanted = wanted + (expected * target).sum() + balance
    assert not training or factor >= 1 or found[0].dropped.sum() > 0
    of = [hidden, *network.parameters()]
    mine = torch.autograd.grad(total, of)
    theirs = torch.autograd.grad(wanted, of, allow_unused=True)
    for ours, expected in zip(mine, theirs, strict=True):  # None: an expert that no token has chosen
        torch.testing.assert_close(
            ours, torch.zeros_like(ours) if expected is None else expected, atol=5e-6, rtol=1e-4
        )


def test_the_second_expert_is_drawn_by_its_probability():
    router = Router(2, Experts((0,), 3, 2)).train()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        chosen = router(torch.tensor([[1.0, 0.0]]).repeat(1, 4000, 1)).experts[0]
        assert (chosen[:, 0] == 0).all()
        # Of experts 1 and 2, with logits 1 and 0.
        assert float((chosen[:, 1] == 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
        assert (router.eval()(torch.tensor([[[1.0, 0.0]]])).experts == torch.tensor([[0, 1]])).all()


def test_even_use_of_experts_costs_one():
    router = Router(4, Experts((0,), 4, 2))
    with torch.no_grad():
        router.weight.copy_(3 * torch.eye(4))
    assert router(torch.eye(4)[None]).balance.item() == pytest.approx(1.0)
    assert router(torch.eye(4)[None, :1].repeat(1, 4, 1)).balance.item() > 2


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_an_upcycled_model_answers_as_the_dense_one(siglip, family):
    """Every expert is a copy, and weights of a token add up to 1."""
    model = make_model(siglip, family, dtype=torch.float32)
    batch = make_batch(["qIqaa", "Iqa"], dtype=torch.float32)
    before = model(**batch.inputs).logits
    upcycle(model, Experts((0, 2)))
    assert model.config.model_type == f"llava_{family}_sparse" and list(routers(model)) == [0, 2]
    torch.testing.assert_close(model(**batch.inputs).logits, before, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(model, Experts((0, 2)))


@pytest.mark.parametrize("values, message", [((9,), "layer 9 of 4"), (([0], 2, 3), "3 choices of 2 experts")])
def test_experts_that_cannot_be(siglip, values, message):
    with pytest.raises(ValueError, match=f"experts: {message}"):
        upcycle(make_model(siglip), Experts(values if isinstance(values[0], int) else tuple(values[0]), *values[1:]))


def test_bf16_stays_near_fp32():
    """The router is float32 in both, so that the same experts are chosen."""
    torch.manual_seed(1)
    rounded = SparseMLP(_Config, _Expert, Experts((0,))).bfloat16().eval()
    exact = SparseMLP(_Config, _Expert, Experts((0,))).eval()
    exact.load_state_dict(rounded.state_dict())
    hidden = torch.randn(2, 9, 5).bfloat16()
    assert torch.equal(rounded.router(hidden).experts, exact.router(hidden.float()).experts)
    output = rounded(hidden)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact(hidden.float()), atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, chosen = exact(hidden.float()), exact.router(hidden.float()).experts
    assert mixed.dtype == torch.float32 and torch.equal(chosen, exact.router(hidden.float()).experts)
    assert not torch.equal(mixed, exact(hidden.float())), "the experts are rounded"
    torch.testing.assert_close(mixed, exact(hidden.float()), atol=0.02, rtol=0.02)


def test_the_saved_experts_are_read_back(siglip, world, tmp_path):
    """By the loader that training and evaluation use, from a checkpoint in LLaVA's generation's format."""
    from llava_compodistill.hosts import load_model

    model = make_model(siglip, dtype=torch.float32)
    upcycle(model, Experts((1, 3), count=3))
    with torch.no_grad():
        for parameter in model.get_model().layers[1].mlp.parameters():
            parameter.normal_(std=0.2)
    again = load_model(str(checkpoint_folder(tmp_path / "sparse", model, world["tokenizer"])))
    weights = dict(again.named_parameters())
    for name, value in model.named_parameters():
        assert "vision_tower" in name or torch.equal(weights[name], value), name
