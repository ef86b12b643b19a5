"""Sparse language models: feed-forward layers as mixtures of experts (LLaVA-MoD, arXiv 2408.15881).

Every other layer's feed-forward network becomes four copies of itself, and a router sends each token to two of them
("sparse upcycling"). The config entry `experts` says which layers and how many; LLaVA loads such a checkpoint by its
model_type, `llava_qwen2_sparse` and so on.

In training an expert takes a limited number of tokens, and what exceeds it is dropped, first choices last; a token's
second choice is drawn. In evaluation nothing is dropped or drawn, so that a sample's answer does not depend on its
batch. (The authors' limit in evaluation, twice the even share, comes to the same with four experts and two choices.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Experts:
    """The `experts` entry of a config.

    Attributes:
        layers: numbers of the layers with experts.
        count: experts a layer.
        choices: experts a token.
        capacity_factor: what an expert takes in training, in even shares of the batch's tokens times choices.
    """

    layers: tuple[int, ...]
    count: int = 4
    choices: int = 2
    capacity_factor: float = 1.5

    def __post_init__(self) -> None:
        if not 1 <= self.choices <= self.count:
            raise ValueError(
                f"experts: {self.choices} choices of {self.count} experts; there must be 1 to {self.count}."
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"experts: capacity_factor {self.capacity_factor} must be above 0.")


class Routing(NamedTuple):  # a tuple, in which ZeRO-3 finds the tensors that a module returns
    """Where S tokens go.

    Attributes:
        experts: [S, choices], expert numbers, first choice first.
        weights: [S, choices], float32, 0 where an expert has no room; the others of a token add up to 1.
        balance: scalar, E sum_e m_e c_e with m_e the mean probability of expert e and c_e the share of tokens whose
            first choice it is: 1 where all experts are used alike.
        dropped: scalar, the share of choices that found no room.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    balance: torch.Tensor
    dropped: torch.Tensor


class Router(nn.Module):
    """Chooses experts for tokens by a linear layer, in float32 whatever the model's precision."""

    def __init__(self, size: int, settings: Experts, generator: torch.Generator | None = None):
        super().__init__()
        self.settings = settings
        start = torch.empty(settings.count, size, device="cpu").uniform_(-1, 1, generator=generator)
        self.weight = nn.Parameter(torch.empty(settings.count, size))
        with torch.no_grad():
            self.weight.copy_(start / math.sqrt(size))  # as torch's linear layers start

    def forward(self, tokens: torch.Tensor) -> Routing:
        """[S, D] -> Routing."""
        count, choices = self.settings.count, self.settings.choices
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
        probabilities = logits.softmax(dim=-1)
        chosen = [probabilities.argmax(dim=-1)]
        # The later choices are drawn in training, by the largest of the noisy logits that are left.
        noisy = logits.detach() + _gumbel(logits) if self.training else logits.detach()
        for _ in range(1, choices):
            taken = torch.stack(chosen, dim=1)
            chosen.append(noisy.scatter(1, taken, -math.inf).argmax(dim=-1))
        experts = torch.stack(chosen, dim=1)
        has_room = self._has_room(experts)
        weights = probabilities.gather(1, experts) * has_room
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        first = F.one_hot(chosen[0], count).float().mean(dim=0)
        balance = count * (probabilities.mean(dim=0) * first).sum()
        return Routing(experts, weights, balance, 1 - has_room.float().mean())

    def _has_room(self, experts: torch.Tensor) -> torch.Tensor:
        """[S, choices] bool: all first choices queue before the second ones, each in the order of the tokens."""
        if not self.training:
            return torch.ones_like(experts, dtype=torch.bool)
        count, tokens = self.settings.count, len(experts)
        capacity = math.ceil(tokens * self.settings.choices / count * self.settings.capacity_factor)
        queue = F.one_hot(experts.t().reshape(-1), count)
        place = (queue.cumsum(dim=0) * queue).sum(dim=1)
        return (place <= capacity).view(self.settings.choices, tokens).t()


def _gumbel(like: torch.Tensor) -> torch.Tensor:
    return -torch.empty_like(like).exponential_().log()


class SparseMLP(nn.Module):
    """A feed-forward network that is one of several for each token.

    Args:
        config: of the language model.
        expert: class of its feed-forward networks.
        generator: draws the router's first weights.
    """

    def __init__(
        self, config: Any, expert: type[nn.Module], settings: Experts, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.router = Router(config.hidden_size, settings, generator)
        self.experts = nn.ModuleList([expert(config) for _ in range(settings.count)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self.router(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            place, choice = ((routing.experts == number) & (routing.weights > 0)).nonzero(as_tuple=True)
            # Also without a token: DDP and ZeRO-3 want every rank to meet the same weights in the same order.
            made = expert(tokens[place]) * routing.weights[place, choice, None].to(tokens.dtype)
            output = output.index_add(0, place, made.to(tokens.dtype))
        return output.view_as(hidden)


def read_experts(config: Any) -> Experts | None:
    """The `experts` entry of a config.

    Raises:
        ValueError: for layers that the model does not have.
    """
    entry = getattr(config, "experts", None)
    if entry is None:
        return None
    settings = Experts(**{**entry, "layers": tuple(entry["layers"])})
    beyond = [layer for layer in settings.layers if not 0 <= layer < config.num_hidden_layers]
    if beyond:
        raise ValueError(f"experts: layer {beyond[0]} of {config.num_hidden_layers}; the first layer is 0.")
    return settings


def install_experts(core: nn.Module) -> None:
    """Give a model that has just been built the experts that its config names."""
    settings = read_experts(core.config)
    if settings is None:
        raise ValueError(f"config.json: model_type {core.config.model_type} needs an entry `experts`.")
    layers = core.get_model().layers
    generator = torch.Generator().manual_seed(torch.initial_seed())  # all ranks draw the same
    for number in settings.layers:
        layers[number].mlp = SparseMLP(core.config, type(layers[number].mlp), settings, generator)


def routers(core: nn.Module) -> dict[int, Router]:
    """The routers by the numbers of their layers; empty for a dense model."""
    found = ((number, layer.mlp) for number, layer in enumerate(core.get_model().layers))
    return {number: network.router for number, network in found if isinstance(network, SparseMLP)}
