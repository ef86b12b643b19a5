"""Sparse language models: feed-forward layers as mixtures of experts (LLaVA-MoD, arXiv 2408.15881).

Every other layer's feed-forward network becomes four copies of itself, and a router sends each token to two of them
("sparse upcycling"). The config entry `experts` says which layers and how many; LLaVA loads such a checkpoint by its
model_type, `llava_qwen2_sparse` and so on.

In training an expert takes a limited number of a sample's tokens, and what exceeds it is dropped, first choices last;
a token's second choice is drawn. Room and balance are those of a sample, without its padding, so that a batch does not
change how its samples are routed (the authors' batches are of one sample). In evaluation nothing is dropped or drawn.
(The authors' limit there, twice the even share, comes to the same with four experts and two choices.)
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
        choices: experts a token, at least 2: the weights of a token's experts add up to 1, and a single one would give
            the router no gradient.
        capacity_factor: what an expert takes in training, in even shares of a sample's tokens times choices.
    """

    layers: tuple[int, ...]
    count: int = 4
    choices: int = 2
    capacity_factor: float = 1.5

    def __post_init__(self) -> None:
        if not 2 <= self.choices <= self.count:
            raise ValueError(
                f"experts: {self.choices} choices of {self.count} experts; there must be at least 2 choices, and no "
                "more than experts."
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"experts: capacity_factor {self.capacity_factor} must be above 0.")


class Routing(NamedTuple):  # a tuple, in which ZeRO-3 finds the tensors that a module returns
    """Where the tokens of B samples go.

    Attributes:
        experts: [B, N, choices], expert numbers, first choice first.
        weights: [B, N, choices], float32, 0 at padding and where an expert has no room; the others of a token add up
            to 1.
        balance: [B], E sum_e m_e c_e with m_e the mean probability of expert e and c_e the share of a sample's tokens
            whose first choice it is: 1 where all experts are used alike.
        dropped: [B], the share of choices that found no room.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    balance: torch.Tensor
    dropped: torch.Tensor


class Router(nn.Module):
    """Chooses experts for tokens by a linear layer, in float32 whatever the model's precision.

    Attributes:
        real: [B, N] bool of the batch that comes next, False at padding; None where nothing is padding.
    """

    def __init__(self, size: int, settings: Experts, generator: torch.Generator | None = None):
        super().__init__()
        self.settings = settings
        self.real: torch.Tensor | None = None
        start = torch.empty(settings.count, size, device="cpu").uniform_(-1, 1, generator=generator)
        self.weight = nn.Parameter(torch.empty(settings.count, size))
        with torch.no_grad():
            self.weight.copy_(start / math.sqrt(size))  # as torch's linear layers start

    def forward(self, hidden: torch.Tensor) -> Routing:
        """[B, N, D] -> Routing."""
        count, choices = self.settings.count, self.settings.choices
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if self.real is None else self.real
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
        probabilities = logits.softmax(dim=-1)
        chosen = [probabilities.argmax(dim=-1)]
        # The later choices are drawn in training, by the largest of the noisy logits that are left.
        noisy = logits.detach() + _gumbel(logits) if self.training else logits.detach()
        for _ in range(1, choices):
            taken = torch.stack(chosen, dim=-1)
            chosen.append(noisy.scatter(-1, taken, -math.inf).argmax(dim=-1))
        experts = torch.stack(chosen, dim=-1)
        has_room = self._has_room(experts, real)
        weights = probabilities.gather(-1, experts) * has_room
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        tokens = real.sum(dim=1).clamp(min=1)
        first = F.one_hot(chosen[0], count) * real[..., None]
        probable = (probabilities * real[..., None]).sum(dim=1)
        balance = count * (probable * first.sum(dim=1)).sum(dim=-1) / tokens**2
        return Routing(experts, weights, balance, 1 - has_room.sum(dim=(1, 2)) / (tokens * choices))

    def _has_room(self, experts: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """[B, N, choices] bool: a sample's first choices queue before its second ones, each in the order of its
        tokens; padding does not queue."""
        count, choices = self.settings.count, self.settings.choices
        there = real[..., None].expand_as(experts)
        if not self.training:
            return there
        capacity = (real.sum(dim=1) * choices / count * self.settings.capacity_factor).ceil()
        queue = F.one_hot(experts, count) * real[..., None, None]
        queue = queue.transpose(1, 2).flatten(1, 2)  # [B, choices x N, E]
        place = (queue.cumsum(dim=1) * queue).sum(dim=-1)
        has_room = (place <= capacity[:, None]).view(len(real), choices, -1).transpose(1, 2)
        return has_room & there


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
        """[B, N, D] -> [B, N, D]."""
        routing = self.router(hidden)
        tokens, experts, weights = (part.flatten(0, 1) for part in (hidden, routing.experts, routing.weights))
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            place, choice = ((experts == number) & (weights > 0)).nonzero(as_tuple=True)
            # Also without a token: DDP and ZeRO-3 want every rank to meet the same weights in the same order.
            made = expert(tokens[place]) * weights[place, choice, None].to(tokens.dtype)
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
