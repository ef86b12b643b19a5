"""Does a claim hold here? A verdict over seeds, with the seeds that an undecided one would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np
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
        verdict: `holds` or `does not hold` where the p-value is below 5 %, else `undecided`.
        difference: mean over seeds of better minus worse, paired by seed, in points.
        low, high: its 95 % interval (Student's t); 90 % for a claim with a margin, which two one-sided tests decide.
        p: paired t-test, two-sided; for a claim with a margin, that the rows differ by the margin or more (TOST).
        signs: two-sided p-value of the paired permutation test, which changes signs at random and assumes no normal
            distribution; None for a claim with a margin.
        effect: Cohen's d of the differences: mean over standard deviation; None where they do not vary.
        ahead: seeds on which `better` is ahead.
        seeds: pairs.
        needed: seeds after which a difference of this size would be found in 4 of 5 experiments; None where the sign
            is against the claim, or it is decided.
        adjusted: p corrected for the claims of its family (Holm); None outside of one.
    """

    claim: Claim
    verdict: str
    difference: float
    low: float
    high: float
    p: float
    seeds: int
    needed: int | None
    signs: float | None = None
    effect: float | None = None
    ahead: int = 0
    adjusted: float | None = None


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
    difference, spread = mean(differences), stdev(differences)
    effect = difference / spread if spread else None
    ahead = sum(value > 0 for value in differences)
    if claim.margin is not None:
        low, high, p = equivalence(differences, claim.margin)
        verdict = HOLDS if p < 1 - _LEVEL else FAILS if low > claim.margin or high < -claim.margin else UNDECIDED
        return Verdict(
            claim, verdict, difference, low, high, p, len(differences), None, effect=effect, ahead=ahead
        )  # fmt: skip
    low, high, p = interval(differences)
    verdict = UNDECIDED if p >= 1 - _LEVEL else HOLDS if difference > 0 else FAILS
    needed = None
    if verdict == UNDECIDED and difference > 0:
        needed = seeds_needed(difference, spread)
    signs = sign_changes(differences)
    return Verdict(claim, verdict, difference, low, high, p, len(differences), needed, signs, effect, ahead)


def judge_family(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts of claims that are judged together, their p-values corrected by Holm's step-down method
    (Scandinavian Journal of Statistics 6, 1979): the chance of any false `holds` among them stays below 5 %."""
    adjusted = holm([verdict.p for verdict in verdicts])
    found = []
    for verdict, p in zip(verdicts, adjusted, strict=True):
        decided = verdict.verdict if p < 1 - _LEVEL else UNDECIDED
        if verdict.claim.margin is not None and verdict.verdict == FAILS:
            decided = FAILS  # p belongs to the other direction
        found.append(replace(verdict, adjusted=p, verdict=decided))
    return found


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = highest
    return adjusted


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, p): the 95 % interval of their mean, and the two-sided p-value of it being 0."""
    count, centre, spread = len(differences), mean(differences), stdev(differences)
    if spread == 0:
        return centre, centre, 0.0 if centre else 1.0
    error = spread / math.sqrt(count)
    half = float(stats.t.ppf(0.5 + _LEVEL / 2, count - 1)) * error
    return centre - half, centre + half, float(2 * stats.t.sf(abs(centre) / error, count - 1))


def equivalence(differences: Sequence[float], margin: float) -> tuple[float, float, float]:
    """(low, high, p): the 90 % interval of their mean, and the p-value of it being `margin` or more away from 0: the
    larger of two one-sided t-tests (Schuirmann, 1987)."""
    count, centre, spread = len(differences), mean(differences), stdev(differences)
    if spread == 0:
        return centre, centre, 0.0 if abs(centre) < margin else 1.0
    error = spread / math.sqrt(count)
    half = float(stats.t.ppf(_LEVEL, count - 1)) * error
    return centre - half, centre + half, float(stats.t.sf((margin - abs(centre)) / error, count - 1))


def sign_changes(differences: Sequence[float]) -> float:
    """Two-sided p-value of their mean being 0 when each could as well have the other sign: the paired permutation
    test, over all changes of sign for up to 14 pairs, over a random sample of them for more."""
    found = stats.permutation_test(
        (np.asarray(differences),), np.mean, permutation_type="samples", n_resamples=2**14, rng=0
    )  # fmt: skip
    return float(found.pvalue)


def seeds_needed(
    difference: float, spread: float, most: int = 1000, level: float = _LEVEL, power: float = _POWER
) -> int | None:
    """Pairs after which a two-sided paired t-test finds a difference of this size and spread.

    Args:
        difference, spread: mean and standard deviation of the paired differences.
        level: 1 minus the p-value that counts as found.
        power: the share of experiments that are to find it.

    Returns:
        None where even `most` are too few.
    """
    effect = abs(difference) / spread
    for count in range(2, most + 1):
        critical = float(stats.t.ppf(0.5 + level / 2, count - 1))
        if stats.nct.sf(critical, count - 1, effect * math.sqrt(count)) >= power:
            return count
    return None
