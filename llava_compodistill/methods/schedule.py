"""How a term's weight changes over a stage: by a factor that depends on the optimizer step alone."""

from __future__ import annotations

import math

#: The kinds, and where their factors have reached the last value, as a share of the stage, unless it is said.
ENDS = {"linear": 1.0, "cosine": 1.0, "warmup": 0.1}


class Schedule:
    """A factor f(p) of a weight; p is the share of the stage's optimizer steps that are made before the one at hand.

    With u = min(1, p / end):

    * ``linear``: 1 - u;
    * ``cosine``: (1 + cos(pi u)) / 2;
    * ``warmup``: u.

    As in a learning rate's schedule, the first of n steps has p = 0 and the last one p = 1 - 1/n.

    Args:
        kind: linear, cosine or warmup.
        end: in (0, 1]: the p from which on the factor is 0 (linear, cosine) or 1 (warmup).

    Raises:
        ValueError: for another kind or end, with the values allowed.
    """

    def __init__(self, kind: str, end: float):
        if kind not in ENDS:
            raise ValueError(f"a schedule is one of {', '.join(ENDS)}, got {kind!r}")
        if not 0 < end <= 1:
            raise ValueError(f"a schedule's end is a share of the stage in (0, 1], got {end}")
        self.kind, self.end = kind, end

    def __call__(self, progress: float) -> float:
        """The factor after a share of the stage's steps, in [0, 1]."""
        done = min(1.0, max(0.0, progress) / self.end)
        if self.kind == "warmup":
            return done
        return 1.0 - done if self.kind == "linear" else (1.0 + math.cos(math.pi * done)) / 2

    def __str__(self) -> str:
        way = "rises from 0 to 1" if self.kind == "warmup" else "falls from 1 to 0"
        return f"a factor that {way} over the first {self.end:.3g} of the stage's steps ({self.kind})"
