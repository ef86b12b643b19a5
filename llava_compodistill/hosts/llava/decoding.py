"""Sequences continued token by token, in a batch, from what a forward of their prompts has left in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def continue_sequences(
    core: nn.Module,
    hidden: torch.Tensor,
    cache: Any,
    mask: torch.Tensor,
    positions: torch.Tensor,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
    ends: Sequence[int],
    limits: torch.Tensor,
) -> tuple[list[list[int]], list[bool]]:
    """Continue R sequences until each has said an end token, or as much as it may.

    Args:
        core: a LLaVA model.
        hidden: [R, D], the last hidden states at the last token of each prompt.
        cache: `past_key_values` of the prompts' forward.
        mask: [R, L] int64, 1 where the cache holds a real token: padding may stand anywhere, it is not seen.
        positions: [R], the position of the first new token of each sequence: the number of its real tokens.
        choose: (hidden states [R, D], number of the new token) -> tokens [R].
        ends: the end tokens; with none each sequence is as long as it may be.
        limits: [R], the most new tokens of each sequence.

    Returns:
        For each sequence its new tokens without the end token, and whether it has said one.
    """
    stops = torch.tensor(list(ends), dtype=torch.long, device=hidden.device)
    count = len(hidden)
    ended, stopped = (torch.zeros(count, dtype=torch.bool, device=hidden.device) for _ in range(2))
    found: list[torch.Tensor] = []
    most = int(limits.max())
    for step in range(most):
        token = choose(hidden, step)
        ended = ended | (step >= limits)
        stopped = stopped | (~ended & torch.isin(token, stops))
        ended = ended | stopped
        if bool(ended.all()):
            break
        found.append(torch.where(ended, -1, token))
        if step + 1 == most:
            break
        mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        outputs = core.get_model()(
            inputs_embeds=core.get_model().embed_tokens(token[:, None]),
            attention_mask=mask,
            position_ids=(positions + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        cache, hidden = outputs.past_key_values, outputs.last_hidden_state[:, -1]
    rows = torch.stack(found, dim=1).tolist() if found else [[]] * count
    return [row[: row.index(-1)] if -1 in row else row for row in rows], stopped.tolist()
