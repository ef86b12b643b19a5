"""Running sums of a method's terms between two logs. They stay on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..methods import Sums, Term
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

    def add(self, step: int, term: Term, sums: Sums, count: torch.Tensor, weight: float) -> None:
        """One term of one micro-batch.

        Args:
            step: optimizer steps made so far.
            count: what the sums of this optimizer step are divided by.
            weight: the term's in this step.
        """
        if not self:
            self._first_step = step
        if sums.logged or sums.loss is not None:
            # The loss itself is looked at, too: it may be made of more than what is logged.
            loss = sums.loss if sums.loss is not None else torch.zeros_like(count)
            found = [*sums.logged.values(), loss]
            weights = [*(sums.weights.get(name, weight) for name in sums.logged), weight]
            values = [(value.detach() / count).float() for value in found]
            weighted = [value * weight for value, weight in zip(values, weights, strict=True)]
            self._add((*sums.logged, term.name), torch.stack(values), torch.stack(weighted), step)
        for name, (value, counted) in sums.measured.items():
            self.measure(step, name, value, counted)

    def measure(self, step: int, name: str, value: torch.Tensor, count: torch.Tensor) -> None:
        """A sum and what it is divided by in the log, each added up since the last one. Every rank measures the same
        names.

        Args:
            step: optimizer steps made so far.
        """
        if not self:
            self._first_step = step
        pair = torch.stack([part.detach().float() for part in (value, count)])
        self._ratios[name] = self._ratios[name] + pair if name in self._ratios else pair

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
        totals = iter(row.tolist())
        steps = max(1, step - self._first_step)
        values: dict[str, float] = {}
        for names in self._means:
            means = [next(totals) / steps for _ in names]
            values |= dict(zip(names[:-1], means, strict=False))  # the last is the term's loss, which is not logged
        for name in self._ratios:
            total, count = next(totals), next(totals)
            if count:
                values[name] = total / count
        if any(totals):
            self._refuse()
        return values

    def _refuse(self) -> None:
        """Name what was not finite first."""
        totals = self._means.values()
        found = torch.stack(
            [torch.cat([total.broken_at for total in totals]), torch.cat([total.broken_value for total in totals])]
        )
        if self.accelerator.num_processes > 1:
            found = self.accelerator.gather(found[None])
        ranks = found.view(-1, 2, found.shape[-1]).tolist()
        first = min(at for rank in ranks for at in rank[0] if at >= 0)
        culprits: dict[str, float] = {}
        place = 0
        for names in self._means:
            values: dict[str, float] = {}
            for name in names:
                broken = [rank[1][place] for rank in ranks if rank[0][place] == first]
                if broken:
                    values[name] = broken[0]
                place += 1
            # A term's loss is only to blame where none of its logged parts is.
            culprits |= {name: value for name, value in values.items() if name != names[-1]} or values
        refuse_broken_losses(culprits, int(first) + 1, self.args)

    def take(self, step: int) -> dict[str, float]:
        """As `read`, and begin anew."""
        values = self.read(step)
        self._clear()
        return values
