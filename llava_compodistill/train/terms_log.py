"""Running sums of a method's terms between two logs. They stay on the device until they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..methods import Sums
from .finite import refuse_broken_losses

#: [K] of this rank -> [K] over all ranks.
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class TermsLog:
    """What the terms have come to since the last log; true where there is anything."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._first_step = 0
        self._means: dict[str, torch.Tensor] = {}  # sums over micro-batches of what is normalised by its step
        self._ratios: dict[str, torch.Tensor] = {}  # [2]: sum, count
        self._weights: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._means or self._ratios)

    def add(self, step: int, sums: Sums, count: torch.Tensor) -> None:
        """One term of one micro-batch.

        Args:
            step: optimizer steps made so far.
            count: what the sums of this optimizer step are divided by.
        """
        if not self:
            self._first_step = step
        self._weights |= {name: sums.weights.get(name, 1.0) for name in sums.logged}
        for name, value in sums.logged.items():
            self._add(self._means, name, (value.detach() / count).float())
        for name, pair in sums.measured.items():
            self._add(self._ratios, name, torch.stack([part.detach().float() for part in pair]))

    @staticmethod
    def _add(totals: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        totals[name] = totals[name] + value if name in totals else value

    def read(self, over_ranks: SumOverRanks, step: int) -> tuple[tuple[int, int], dict[str, float], dict[str, float]]:
        """((first, last) optimizer step, value by name, weight by name); waits for the device.

        Args:
            step: optimizer steps made so far.
        """
        steps = max(1, step - self._first_step)
        # Every rank has met the same terms: a term logs its names on every batch.
        row = torch.cat([*(value[None] for value in self._means.values()), *self._ratios.values()])
        totals = over_ranks(row).tolist()
        values = {name: totals[place] / steps for place, name in enumerate(self._means)}
        for place, name in enumerate(self._ratios):
            total, count = totals[len(self._means) + 2 * place :][:2]
            if count:
                values[name] = total / count
        return (self._first_step + 1, self._first_step + steps), values, dict(self._weights)

    def take(self, over_ranks: SumOverRanks, step: int) -> tuple[tuple[int, int], dict[str, float], dict[str, float]]:
        """As `read`, and begin anew."""
        found = self.read(over_ranks, step)
        self._clear()
        return found

    def check(self, over_ranks: SumOverRanks, step: int, args: Any) -> None:
        """Raise NonFiniteLossError where a term has become NaN or infinite."""
        steps, values, weights = self.read(over_ranks, step)
        refuse_broken_losses(values, weights, steps, args)
