"""Preference losses over pairs of answers: DPO (arXiv 2305.18290) and the paired KTO loss that LLaVA-MoD takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

KINDS = ("kto_pair", "dpo")


def preference_loss(chosen: torch.Tensor, rejected: torch.Tensor, kind: str, beta: float) -> torch.Tensor:
    """The losses of P pairs.

    With r+ and r- the log-ratios of student and reference for the chosen and the rejected answer:

        dpo       -log sigma(beta (r+ - r-))
        kto_pair  the mean of 1 - sigma(beta (r+ - K-)) and 1 - sigma(beta (K+ - r-)), where K+ and K-, at least 0, are
                  the batch's means of r+ and of r-: what the whole batch has moved is no reward

    Args:
        chosen, rejected: [P], log p_S(answer) - log p_R(answer).
        kind: one of KINDS.

    Returns:
        [P].

    Raises:
        ValueError: for another kind.
    """
    if kind == "dpo":
        return -F.logsigmoid(beta * (chosen - rejected))
    if kind != "kto_pair":
        raise ValueError(f"preference loss {kind!r}: must be one of {', '.join(KINDS)}.")
    moved_chosen, moved_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    first = 1 - torch.sigmoid(beta * (chosen - moved_rejected))
    second = 1 - torch.sigmoid(beta * (moved_chosen - rejected))
    return (first + second) / 2
