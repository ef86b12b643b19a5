"""Running sums of a method's terms between two logs. They stay on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..methods import Sums
from .finite import refuse_broken_losses


@dataclass
class _Total:
    """Of the values that one term logs, [K]: running sums, and when each first was not finite, and what it was then.

    Steps are counted from 0; -1 where there was none.
    """

    sums: torch.Tensor
    broken_at: torch.Tensor
    broken_value: torch.Tensor


class TermsLog:
    """What the terms have come to since the last log; true where there is anything.

    Args:
        accelerator: sums over ranks.
        args: names the ways out in errors.
    """

    def __init__(self, accelerator: Accelerator, args: Any):
        self.accelerator, self.args = accelerator, args
        self._clear()

    def _clear(self) -> None:
        self._first_step = 0
        self._means: dict[tuple[str, ...], _Total] = {}  # by names: what is normalised by its step's count
        self._ratios: dict[str, torch.Tensor] = {}  # [2]: sum, count

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
        if sums.logged:
            values = torch.stack([value.detach() / count for value in sums.logged.values()]).float()
            weights = [sums.weights.get(name, 1.0) for name in sums.logged]
            self._add(tuple(sums.logged), values, values * values.new_tensor(weights), step)
        for name, pair in sums.measured.items():
            value = torch.stack([part.detach().float() for part in pair])
            self._ratios[name] = self._ratios[name] + value if name in self._ratios else value

    def _add(self, names: tuple[str, ...], values: torch.Tensor, weighted: torch.Tensor, step: int) -> None:
        total = self._means.get(names)
        if total is None:
            zeros = torch.zeros_like(values)
            total = self._means[names] = _Total(zeros, zeros - 1, zeros)
        total.sums = total.sums + values
        newly = ~torch.isfinite(weighted) & (total.broken_at < 0)
        total.broken_at = torch.where(newly, float(step), total.broken_at)
        total.broken_value = torch.where(newly, weighted, total.broken_value)

    def read(self, step: int) -> dict[str, float]:
        """Value by name, over ranks; waits for the device.

        Args:
            step: optimizer steps made so far.

        Raises:
            NonFiniteLossError: on all ranks, when a term was not finite on one of them.
        """
        # Every rank has met the same terms: a term logs its names on every batch.
        sums = [total.sums for total in self._means.values()]
        broken = [(total.broken_at >= 0).sum()[None].float() for total in self._means.values()]
        row = torch.cat([*sums, *self._ratios.values(), *broken])
        if self.accelerator.num_processes > 1:
            row = self.accelerator.reduce(row, "sum")
        totals = row.tolist()
        names = [name for group in self._means for name in group]
        steps = max(1, step - self._first_step)
        values = {name: totals[place] / steps for place, name in enumerate(names)}
        for place, name in enumerate(self._ratios):
            total, count = totals[len(names) + 2 * place :][:2]
            if count:
                values[name] = total / count
        if any(totals[len(totals) - len(broken) :]):
            self._refuse(names)
        return values

    def _refuse(self, names: list[str]) -> None:
        totals = self._means.values()
        found = torch.stack(
            [torch.cat([total.broken_at for total in totals]), torch.cat([total.broken_value for total in totals])]
        )
        if self.accelerator.num_processes > 1:
            found = self.accelerator.gather(found[None])
        ranks = found.view(-1, 2, len(names)).tolist()
        first = min(at for rank in ranks for at in rank[0] if at >= 0)
        values = {
            name: rank[1][place] for rank in ranks for place, name in enumerate(names) if rank[0][place] == first
        }
        refuse_broken_losses({name: values[name] for name in names if name in values}, int(first) + 1, self.args)

    def take(self, step: int) -> dict[str, float]:
        """As `read`, and begin anew."""
        values = self.read(step)
        self._clear()
        return values
