"""How large a cache becomes, from the lengths of its samples alone; and what other options would make of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ...errors import DiskError
from .entries import DIGEST, What, merged, token_bytes
from .quantise import LOGIT_BITS, MAP_BITS, dense_or_sparse_bytes
from .run import said
from .shards import shard_name

if TYPE_CHECKING:
    from .make import Job

#: Samples whose lengths the size is estimated from.
MEASURED = 512

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
    def of(
        cls, sample: Mapping[str, Any], patches: int, limit: int | None, names: Sequence[str], pad: int | None = None
    ) -> Lengths:
        batch = merged(sample, patches, limit, pad)
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


# ---------------------------------------------------------------------------------------------------------------------
# Of the data of a command
# ---------------------------------------------------------------------------------------------------------------------
def measure(job: Job) -> list[Lengths]:
    """The lengths of a few hundred samples, spread evenly over the data."""
    names = list(dict.fromkeys([job.what.rows, "all", "answer"]))
    found: list[Lengths] = []
    for position in np.linspace(0, len(job.dataset) - 1, min(MEASURED, len(job.dataset))).astype(int).tolist():
        try:
            sample = job.dataset.read_text(position)
        except Exception as error:
            if job.dataset.fault(error) is None:
                raise
            continue  # it names itself when it is read in earnest
        pad = job.dataset.tokenizer.pad_token_id
        found.append(Lengths.of(sample, job.patches, job.args.model_max_length, names, pad))
    return found


def show_size(job: Job, lengths: Sequence[Lengths]) -> None:
    """Print what a sample and the whole cache take, and what other options would."""
    size, count = mean_bytes(lengths, job.what), len(job.dataset)
    table = Table(box=box.SIMPLE)
    for name in ("", "logits a sample", "maps a sample", "a sample", "in all", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for name, what in [("this command", job.what), *alternatives(job.what, ("all", "answer"))]:
        other = mean_bytes(lengths, what)
        cells = (other.logits, other.maps, other.total, other.total * count)
        table.add_row(name, *map(readable, cells), f"{other.total / max(1, size.total):.2f}")
    console = Console(width=max(100, Console().width))
    console.print(f"{count:,} samples: {said(job.what)}")
    console.print(table)
    console.print(f"At most, by the lengths of {len(lengths)} samples: zeros that a map need not have take less.")


def readable(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def check_room(each: float, todo: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]], folder: Path) -> None:
    """Refuse to make what the disk has no room for.

    Args:
        each: bytes of a sample at most. Where shards are whole, their samples' mean tells more.
        todo, whole: blocks of samples that are to be made, and those that are there.

    Raises:
        DiskError: with the space needed, the space free, and the ways out.
    """
    if whole:
        present = sum((folder / shard_name(*block)).stat().st_size for block in whole)
        each = min(each, 1.05 * present / sum(stop - start for start, stop in whole))
    needed, free = each * sum(stop - start for start, stop in todo), shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"--output {folder}: the cache needs about {readable(needed)} more, and {readable(free)} are free. Free "
            "some space, name another folder, or take smaller options (see the table): fewer bits, a smaller --top_k, "
            "or maps of answer rows alone (--attention_rows answer, in training as well)."
        )
