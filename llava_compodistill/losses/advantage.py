"""Weights of answer tokens by visual advantage, as a pure function of log-probabilities."""

from __future__ import annotations

import torch


def advantage_weights(advantage: torch.Tensor, floor: float) -> torch.Tensor:
    """What each token of a sample counts, by how much the image helps the teacher to predict it.

    Visual advantage (VA-OPD, arXiv 2605.21924) is a_t = log p(y_t | image, text) - log p(y_t | text). Of the
    probability that the teacher gives a token, the share

        s_t = 1 - exp(-max(0, a_t)) = max(0, 1 - p(y_t | text) / p(y_t | image, text))

    is due to the image, and the weight is floor + s_t, divided by its mean over the sample. So the weights of a sample
    have the mean 1; they are at most 1 + 1 / floor and rise with a_t; and without any advantage they are all 1.

    Args:
        advantage: [B, K] in nats; NaN where a token has none, or there is no token.
        floor: greater than 0, what a token counts without any advantage.

    Returns:
        [B, K] without a graph; 1 where the advantage is NaN.
    """
    if not floor > 0:
        raise ValueError(f"floor must be greater than 0, got {floor}")
    advantage = advantage.detach()
    known = ~advantage.isnan()
    share = -torch.expm1(-advantage.clamp(min=0))
    value = (floor + share).masked_fill(~known, 0.0)
    # The mean is above 0 wherever it is used.
    mean = value.sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True)
    return torch.where(known, value / mean, 1.0)
