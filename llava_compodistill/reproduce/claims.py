"""Does a claim of the paper hold here? A verdict over seeds, with the seeds that an undecided one would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from .studies import Claim

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_LEVEL = 0.95
_POWER = 0.8


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about a claim.

    Attributes:
        claim: the claim.
        verdict: `holds` or `does not hold` where the 95 % interval of the difference leaves 0 out, else `undecided`.
        difference: mean over seeds of better minus worse, paired by seed, in points.
        low, high: its 95 % interval (Student's t).
        p: two-sided, paired t-test.
        seeds: pairs.
        needed: seeds after which a difference of this size would be found in 4 of 5 experiments; None where the sign
            is against the claim, or it is decided.
    """

    claim: Claim
    verdict: str
    difference: float
    low: float
    high: float
    p: float
    seeds: int
    needed: int | None


def judge(claim: Claim, scores: Mapping[str, Mapping[int, float]]) -> Verdict | None:
    """Judge a claim.

    Args:
        scores: by row, then by seed, the claim's metric.

    Returns:
        None with fewer than two seeds that both rows have.
    """
    better, worse = scores.get(claim.better, {}), scores.get(claim.worse, {})
    differences = [better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())]
    if len(differences) < 2:
        return None
    low, high, p = interval(differences)
    difference = mean(differences)
    verdict = HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED
    needed = None
    if verdict == UNDECIDED and difference > 0:
        needed = seeds_needed(difference, stdev(differences))
    return Verdict(claim, verdict, difference, low, high, p, len(differences), needed)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, p): the 95 % interval of their mean, and the two-sided p-value of it being 0."""
    count, centre, spread = len(differences), mean(differences), stdev(differences)
    if spread == 0:
        return centre, centre, 0.0 if centre else 1.0
    error = spread / math.sqrt(count)
    half = float(stats.t.ppf(0.5 + _LEVEL / 2, count - 1)) * error
    return centre - half, centre + half, float(2 * stats.t.sf(abs(centre) / error, count - 1))


def seeds_needed(difference: float, spread: float, most: int = 1000) -> int | None:
    """Pairs after which a paired t-test at 5 % finds a difference of this size and spread in 4 of 5 experiments.

    Returns None where even `most` are too few.
    """
    effect = abs(difference) / spread
    for count in range(2, most + 1):
        critical = float(stats.t.ppf(0.5 + _LEVEL / 2, count - 1))
        if stats.nct.sf(critical, count - 1, effect * math.sqrt(count)) >= _POWER:
            return count
    return None
