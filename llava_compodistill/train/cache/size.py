"""How large a cache becomes, from the lengths of its samples alone; and what other options would make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .entries import DIGEST, What, merged, token_bytes
from .quantise import LOGIT_BITS, MAP_BITS, dense_or_sparse_bytes

#: Of each part of an entry.
_LENGTH = 8


@dataclass(frozen=True)
class Lengths:
    """Of one sample: rows that predict an answer token; by name of rows the queries that count in L_ADL; visual
    tokens; and for each name of rows the entries of a map that a causal model can have."""

    answers: int
    rows: Mapping[str, int]
    columns: int
    visible: Mapping[str, int]

    @classmethod
    def of(cls, sample: Mapping[str, Any], patches: int, limit: int | None, names: Sequence[str]) -> Lengths:
        batch = merged(sample, patches, limit)
        seen = batch.visual.long().cumsum(dim=1)
        masks = {name: batch.attention_rows(name) for name in names}
        return cls(
            int(batch.answer_mask().sum()),
            {name: int(mask.sum()) for name, mask in masks.items()},
            batch.visual_index.shape[1],
            {name: int(seen[mask].sum()) for name, mask in masks.items()},
        )


@dataclass(frozen=True)
class Bytes:
    """At most, of one sample or on average."""

    logits: float
    maps: float
    rest: float

    @property
    def total(self) -> float:
        return self.logits + self.maps + self.rest


def bytes_of(sample: Lengths, what: What) -> Bytes:
    """What an entry takes at most: exactly, but for zeros of maps where a causal model could have others."""
    logits = maps = 0
    if what.answers:
        row = min(what.top_k, what.vocab) * (token_bytes(what.vocab) + what.logit_bits / 8) + 4
        row += 0 if what.logit_bits == 32 else 8
        logits = sample.answers * row
    rows, columns = sample.rows[what.rows], sample.columns
    if rows and columns:
        each = dense_or_sparse_bytes(rows * columns, sample.visible[what.rows], what.map_bits)
        maps = len(what.groups) * (each + (0 if what.map_bits == 32 else 4 * rows))
    parts = 3 + (5 if what.answers else 0) + 3 * len(what.groups)
    return Bytes(logits, maps, 2 * DIGEST + 3 * 8 + parts * _LENGTH)


def mean_bytes(samples: Sequence[Lengths], what: What) -> Bytes:
    """Of the samples on average."""
    found = [bytes_of(sample, what) for sample in samples]
    count = max(1, len(found))
    return Bytes(*(sum(getattr(part, name) for part in found) / count for name in ("logits", "maps", "rest")))


def alternatives(what: What, names: Sequence[str]) -> list[tuple[str, What]]:
    """Other options, one changed at a time, by the flag that says so."""
    found: list[tuple[str, What]] = []
    if what.answers:
        found += [
            (f"--top_k {k}", replace(what, top_k=k)) for k in (16, 64, 256) if k != what.top_k and k < what.vocab
        ]
        found += [(f"--logit_bits {b}", replace(what, logit_bits=b)) for b in LOGIT_BITS if b != what.logit_bits]
    if what.groups:
        found += [(f"--map_bits {b}", replace(what, map_bits=b)) for b in MAP_BITS if b != what.map_bits]
        found += [(f"--attention_rows {n}", replace(what, rows=n)) for n in names if n != what.rows]
        found.append(("--vat False (no maps)", replace(what, groups=())))
    return found
