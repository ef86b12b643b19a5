"""A headline as a function of sums over items, so that resampling needs no scorer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reading import yes_or_no

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Sums:
    """What a headline is made of.

    Attributes:
        strata: [N] numbers, which group a unit is drawn within (a subset, a category, a task). A unit is an item, or
            what is scored together, such as the questions on one image of MME.
        columns: [N, K], what is summed.
        value: sums [..., S, K] over the S strata, in the order of their numbers -> figures [...], in %.
    """

    strata: np.ndarray
    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def headline(self, units: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """[...]: the figure of units that were drawn, of all of them as they are by default.

        Args:
            units: numbers of units, [..., n] a stratum.
        """
        totals = [self.columns[rows].sum(axis=-2) for rows in (self.by_stratum() if units is None else units)]
        return self.value(np.stack(np.broadcast_arrays(*totals), axis=-2))

    def by_stratum(self) -> list[np.ndarray]:
        """The units' numbers, stratum by stratum."""
        return [np.flatnonzero(self.strata == stratum) for stratum in np.unique(self.strata)]


def numbered(names: Sequence[Hashable]) -> np.ndarray:
    """[N] names -> [N] numbers, by first appearance."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names])


def mean_of_means(
    records: Sequence[Record],
    value_of: Callable[[Record], float],
    stratum_of: Callable[[Record], Hashable] = lambda record: "",
    group_of: Callable[[Hashable], Hashable] = lambda stratum: stratum,
) -> Sums:
    """The unweighted mean over strata of the mean over items of `value_of`, which is in [0, 1].

    Args:
        group_of: a stratum's group, where the figure is the mean over groups of the means over their strata.
    """
    values = np.array([value_of(record) for record in records], dtype=float)
    columns = np.stack([values, np.ones(len(values))], axis=1)
    names = [stratum_of(record) for record in records]
    groups = [group_of(stratum) for stratum in dict.fromkeys(names)]
    weights = np.array([1 / (len(set(groups)) * groups.count(group)) for group in groups])
    return Sums(numbered(names), columns, lambda sums: 100 * (sums[..., 0] / sums[..., 1] * weights).sum(axis=-1))


def mean_f1(
    records: Sequence[Record],
    lists_of: Callable[[Record], Sequence[Hashable]],
    stratum_of: Callable[[Record], Hashable],
) -> Sums:
    """The mean over lists of questions of F1, yes being the positive answer: of each list hits, "yes" answers and true
    "yes"; F1 = 2 hits / (answered + true). The share of true "yes" is the benchmark's choice, so that a stratum
    should hold one label. A question counts as often as a list names it; in none, it does not count."""
    lists = sorted({name for record in records for name in lists_of(record)}, key=str)
    columns = np.zeros((len(records), 3 * len(lists)))
    for row, record in enumerate(records):
        answered, true = yes_or_no(record["text"]) is True, record["label"] == "yes"
        for place, name in enumerate(lists):
            times = list(lists_of(record)).count(name)
            columns[row, 3 * place : 3 * place + 3] = times * np.array([answered and true, answered, true])

    def value(sums: np.ndarray) -> np.ndarray:
        hits, answered, true = (sums.sum(axis=-2)[..., place::3] for place in range(3))
        return 100 * (2 * hits / np.maximum(answered + true, 1)).mean(axis=-1)

    return Sums(numbered([stratum_of(record) for record in records]), columns, value)
