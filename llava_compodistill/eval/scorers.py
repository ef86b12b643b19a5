"""The benchmarks' scorers by name, for any model's records; `benchmarks.figures` says what a record holds."""

from __future__ import annotations

from .benchmarks.bivlc import score as bivlc
from .benchmarks.gqa import score as gqa
from .benchmarks.mme import score as mme
from .benchmarks.pope import score as pope
from .benchmarks.rbench import score as rbench
from .benchmarks.reefknot import score as reefknot
from .benchmarks.sade import score as sade
from .benchmarks.sugarcrepe import score as sugarcrepe
from .benchmarks.textvqa import score as textvqa
from .benchmarks.winoground import score as winoground

__all__ = ["bivlc", "gqa", "mme", "pope", "rbench", "reefknot", "sade", "sugarcrepe", "textvqa", "winoground"]
