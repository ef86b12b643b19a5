"""Independent fp64 computations for the tests: written from the formulas, sharing no code with the package.

One sample at a time and without padding, so that padding, batching and masks are what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE = -100
IMAGE = -200


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x [H, N, d] at positions 0 ... N-1: pair (i, i + d/2) turns by position / theta^(2i/d)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def rope_theta(config) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def attention_probabilities(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention probabilities [H, N, N] of q [H, N, d] and k [H_kv, N, d]; 0 where `hidden` [N, N] is True."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).masked_fill(future, -math.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))


def decoder(
    weights: dict, config, embeds: torch.Tensor, hidden_keys: dict[int, torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A Llama or Qwen2 decoder on one sequence [N, D]: final hidden states and each layer's attention [H, N, N].

    `hidden_keys` names by layer the keys that queries do not see, [N, N] bool."""
    length, width = embeds.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    hidden, maps = embeds, []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (
            linear(weights, f"{name}.self_attn.{part}_proj", x).view(length, count, size).transpose(0, 1)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q, rope_theta(config)), rotate(k, rope_theta(config))
        maps.append(attention_probabilities(q, k, (hidden_keys or {}).get(layer)))
        mixed = (maps[-1] @ v.repeat_interleave(heads // kv_heads, dim=0)).transpose(0, 1).reshape(length, width)
        hidden = hidden + linear(weights, f"{name}.self_attn.o_proj", mixed)
        x = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = (linear(weights, f"{name}.mlp.{part}_proj", x) for part in ("gate", "up"))
        hidden = hidden + linear(weights, f"{name}.mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)
    return rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps), maps


def mlp2x_gelu(weights: dict, prefix: str, x: torch.Tensor) -> torch.Tensor:
    x = linear(weights, f"{prefix}.0", x)
    return linear(weights, f"{prefix}.2", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


def visual_tokens(weights: dict, config, features: torch.Tensor) -> torch.Tensor:
    """Adapter of either kind on encoder features [n, patches, D_v]."""
    prefix = "model.mm_projector"
    if config.mm_projector_type == "taf":
        fetched = mlp2x_gelu(weights, f"{prefix}.teacher_adapter", features)
        return linear(weights, f"{prefix}.student_map.0", fetched)
    return mlp2x_gelu(weights, prefix, features)


@dataclass
class Merged:
    """One sample after the merge: token kinds and labels by position, padding left out."""

    kinds: list  # ("text", token) or ("visual", image number, patch)
    labels: list[int]

    @property
    def visual(self) -> list[int]:
        return [position for position, kind in enumerate(self.kinds) if kind[0] == "visual"]

    @property
    def answers(self) -> list[int]:
        """Positions that predict an answer token."""
        return [p for p in range(len(self.labels) - 1) if self.labels[p + 1] != IGNORE]


def merge(ids: list[int], labels: list[int], first_image: int, patches: int, limit: int | None = None) -> Merged:
    """Put each image's patches in the place of its marker, then cut at the limit."""
    kinds, out, image = [], [], first_image
    for token, label in zip(ids, labels, strict=True):
        if token == IMAGE:
            kinds += [("visual", image, patch) for patch in range(patches)]
            out += [IGNORE] * patches
            image += 1
        else:
            kinds.append(("text", token))
            out.append(label)
    return Merged(kinds[:limit], out[:limit])


def run(weights: dict, config, merged: Merged, features: torch.Tensor, blind: int | Sequence[int] | None = None):
    """(final hidden states [N, D], attention [H, N, N] of each layer) of one merged sample; in the layers `blind` its
    text sees no visual token."""
    tokens = visual_tokens(weights, config, features)
    rows = [
        weights["model.embed_tokens.weight"][kind[1]] if kind[0] == "text" else tokens[kind[1], kind[2]]
        for kind in merged.kinds
    ]
    if blind is None:
        return decoder(weights, config, torch.stack(rows))
    visual = torch.tensor([kind[0] == "visual" for kind in merged.kinds])
    hidden = ~visual[:, None] & visual[None, :]
    return decoder(
        weights, config, torch.stack(rows), dict.fromkeys([blind] if isinstance(blind, int) else blind, hidden)
    )


def answer_cost(weights: dict, config, merged: Merged, features: torch.Tensor, blind: int | None = None) -> float:
    """Mean negative log-probability of a sample's answer tokens, in nats."""
    hidden, _ = run(weights, config, merged, features, blind)
    costs = []
    for position in merged.answers:
        logits = weights["lm_head.weight"] @ hidden[position]
        costs.append(float(torch.logsumexp(logits, 0) - logits[merged.labels[position + 1]]))
    return sum(costs) / len(costs)


def visual_map(attention: torch.Tensor, visual: list[int]) -> torch.Tensor:
    """Head mean at the visual keys: [H, N, N] -> [N, N_v]."""
    return attention.mean(dim=0)[:, visual]


def attention_distance(student: torch.Tensor, teacher: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """1 - cosine of each counted row, averaged."""
    total = 0.0
    for row in rows:
        s, t = student[row], teacher[row]
        total = total + 1 - (s @ t) / torch.sqrt((s @ s) * (t @ t))
    return total / len(rows)


def loss_sums(student, teacher, samples: list[Merged], features, layers, groups, vocab: int, temperature: float = 1.0):
    """L_LM, L_KL and L_ADL as sums over rows and samples; `student` and `teacher` are (weights, config)."""
    lm = kl = attention = torch.zeros((), dtype=torch.float64)
    rows = images = 0
    for merged in samples:
        hidden_s, maps_s = run(*student, merged, features)
        hidden_t, maps_t = run(*teacher, merged, features)
        for position in merged.answers:
            logits = student[0]["lm_head.weight"] @ hidden_s[position]
            lm = lm + torch.logsumexp(logits, 0) - logits[merged.labels[position + 1]]
            ours = torch.log_softmax(logits[:vocab] / temperature, 0)
            theirs = torch.log_softmax((teacher[0]["lm_head.weight"] @ hidden_t[position])[:vocab] / temperature, 0)
            kl = kl + (theirs.exp() * (theirs - ours)).sum() * temperature**2
            rows += 1
        visual = merged.visual
        if visual:
            counted = range(visual[0], len(merged.kinds))
            for layer, group in zip(layers, groups, strict=True):
                target = torch.stack([visual_map(maps_t[t], visual) for t in group]).mean(dim=0)
                distance = attention_distance(visual_map(maps_s[layer], visual), target, counted)
                attention = attention + distance / len(layers)
            images += 1
    return lm, kl, attention, rows, images
