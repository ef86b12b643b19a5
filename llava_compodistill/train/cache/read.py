"""A cache as training reads it: sample by sample, in the workers that load data, each compared with what the student
is about to read."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...errors import CacheError
from ...methods.base import Term
from ...pair.tokens import TEACHER
from .entries import What, as_tensors, collate, digests, merged
from .settings import check_sound, held, refuse_unfit
from .shards import REPAIR, SETTINGS_FILE, Shard, damage, read_index, read_settings

_CHANGED = {
    "digest.text": "tokens or labels (other data, another order or draw of a mix, another template or tokenizer)",
    "digest.pixels": "pixels (another image under its name, another way to prepare it, or another release of "
    "transformers, PIL or torchvision)",
}


#: Shards that a process keeps open: each takes some 35 kB, and a large cache has 10,000.
_OPEN = 256
#: Samples that are compared with the data before training, evenly spread.
_LOOKED_AT = 16


def differences(entry: Mapping[str, Any], sample: Mapping[str, Any]) -> str | None:
    """What of a sample is not what the teacher has read; None where nothing is.

    Args:
        sample: as `CheckedDataset.read` gives it, or `read_text`.
    """
    mine = digests(sample, pixels="image" in sample)
    return " and ".join(_CHANGED[part] for part in mine if bytes(entry[part]) != bytes(mine[part])) or None


class TeacherCache:
    """A finished cache.

    Args:
        folder: of `llava-compodistill cache`.
        wanted: what `settings.describe` gives for the run, of which `samples` may be None.
        pad: the padding token, which LLaVA leaves out of a text as well.

    Attributes:
        settings: of the cache.
        what: the run reads of each sample.

    Raises:
        CacheError: when it is not finished, damaged, or not for this run; naming file, setting and way out.
    """

    def __init__(self, folder: str, wanted: Mapping[str, Any], pad: int | None = None):
        self.folder, self._wanted, self._pad = Path(folder), dict(wanted), pad
        self.settings = read_settings(self.folder)
        check_sound(self.folder / SETTINGS_FILE, self.settings)
        refuse_unfit(self.folder, self.settings, wanted)
        # Of a cache that holds more than this run needs, that alone is read.
        self.what = replace(
            held(self.settings),
            answers=wanted["answers"],
            groups=tuple(tuple(group) for group in wanted["groups"]),
        )
        self._parts = self.what.parts
        index = read_index(self.folder)
        for name, entry in index.items():
            problem = damage(self.folder / name, entry)
            if problem is not None:
                raise CacheError(f"{self.folder / name} {problem}. {REPAIR}")
        found = sorted((entry["start"], entry["stop"], name) for name, entry in index.items())
        ends = [0, *(stop for _, stop, _ in found)]
        if [start for start, _, _ in found] != ends[:-1] or ends[-1] != self.settings["samples"]:
            raise CacheError(f"{self.folder}: its shards do not hold its {self.settings['samples']} samples. {REPAIR}")
        self._starts, self._names = [start for start, _, _ in found], [name for _, _, name in found]
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def check_samples(self, count: int, read: Callable[[int], Any]) -> None:
        """Refuse data of another size, or other data, as far as a few samples tell.

        Args:
            read: of the data set, which calls this object's `read`; it may fail for a sample that cannot be used.

        Raises:
            CacheError: naming what differs.
        """
        refuse_unfit(self.folder, self.settings, {**self._wanted, "samples": count})
        for position in sorted({number * count // _LOOKED_AT for number in range(_LOOKED_AT)}):
            read(position)
        self._open.clear()  # not for processes that are forked

    def _shard(self, place: int) -> Shard:
        if place not in self._open:
            self._open[place] = Shard(self.folder / self._names[place], self._parts)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]

    def read(self, position: int, sample: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
        """What the teacher has given for a sample.

        Args:
            position: of the sample in the data.
            sample: as the student reads it: input_ids, labels and image.
            name: how messages call it.

        Raises:
            CacheError: when it is not the sample that the teacher has read, saying what differs.
        """
        place = bisect_right(self._starts, position) - 1
        entry = self._shard(place).read(position - self._starts[place])
        answers, rows, columns = entry["sizes"].tolist()
        if answers < 0:
            raise CacheError(
                f"--teacher_cache {self.folder}: {name} could not be read when the cache was made, but can be "
                "read now. Run the same `llava-compodistill cache` command again: it makes the shards with such "
                "samples again and keeps the rest."
            )
        changed = differences(entry, sample)
        if changed is not None:
            raise CacheError(
                f"--teacher_cache {self.folder}: {name} is not what the teacher has read. Its {changed} differ. Train "
                "on the data that the cache was made of, or make a cache of these."
            )
        if sample["image"].ndim == 3:  # of several crops the host knows how many tokens they become
            batch = merged(sample, self.settings["patches"], self.settings["limit"], self._pad)
            here = (int(batch.answer_mask().sum()), int(batch.attention_rows(self.what.rows).sum()))
            if (*here, batch.visual_index.shape[1]) != (answers, rows, columns):
                raise CacheError(
                    f"--teacher_cache {self.folder}: {name} has {here[0]} answer tokens, {here[1]} queries and "
                    f"{batch.visual_index.shape[1]} visual tokens, and the cache has {answers}, {rows} and {columns}. "
                    "Make the cache anew in another folder."
                )
        return as_tensors(entry, self.what)


class CacheCollator:
    """Collates samples, and under TEACHER what the cache holds of them.

    Args:
        collator: LLaVA's.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collator(samples), TEACHER: collate([sample[TEACHER] for sample in samples])}


def wanted_of(terms: Sequence[Term], args: Any, vocab: int, **quantised: int) -> What:
    """What terms need of a cache.

    Args:
        terms: as they run on the pair, prepared.
        args: of training: `attention_rows` and `kd_temperature`.
        vocab: the tokens that both models share.
        quantised: top_k, logit_bits and map_bits, which are the maker's choice.
    """
    needs = [term.needs()[1] for term in terms]
    groups = sorted(set().union(*(need.groups for need in needs)))
    options = {"top_k": 1, "logit_bits": 32, "map_bits": 32, **quantised}
    answers = any("answer" in need.head for need in needs)
    temperature = args.kd_temperature
    return What(
        answers, temperature=temperature, vocab=vocab, groups=tuple(groups), rows=args.attention_rows, **options
    )
