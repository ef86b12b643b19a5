"""One sample of a cache: made of a teacher's pass, and read back into one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...hosts.base import IGNORE_INDEX, MergedBatch
from ...hosts.llava.model import IMAGE_TOKEN_INDEX
from ...ops.answer_loss.top_tokens import TopTokens, top_tokens
from ...record.forward import Group, Pass
from ...record.head import TopRows
from .quantise import (
    packed,
    quantise_log_probs,
    quantise_map,
    renormalise,
    restore_log_probs,
    restore_map,
    unpacked,
)
from .shards import Entry

#: Bytes of a digest.
DIGEST = 16


@dataclass(frozen=True)
class What:
    """What a cache holds of each sample.

    Attributes:
        answers: whether it holds distributions at answer rows.
        top_k, logit_bits, temperature, vocab: of these: how many tokens, in how many bits, and of which softmax.
        groups: of teacher layers, whose mean maps it holds.
        rows, map_bits: of these: which queries (as --attention_rows), and in how many bits.
    """

    answers: bool
    top_k: int
    logit_bits: int
    temperature: float
    vocab: int
    groups: tuple[Group, ...] = ()
    rows: str = "all"
    map_bits: int = 8

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of an entry's arrays. (A small vocabulary has no `top.high`, a sample of text alone no maps.)"""
        tops = ("top.tokens", "top.high", "top.codes", "top.ends", "top.rest") if self.answers else ()
        maps = [f"{map_name(group)}.{part}" for group in self.groups for part in ("mask", "codes", "peaks")]
        return ("sizes", "digest.text", "digest.pixels", *tops, *maps)


def map_name(group: Group) -> str:
    """What the parts of a group's map begin with."""
    return "map." + "-".join(map(str, group))


def digests(sample: Mapping[str, Any], pixels: bool = True) -> dict[str, np.ndarray]:
    """{"digest.text", "digest.pixels"}: of what a model reads of a sample, as `CheckedDataset.read` gives it. A sample
    of text alone has no pixels, whatever stands in for them.

    Args:
        pixels: False for a sample as `read_text` gives it.
    """
    ids, labels = (sample[name].to(torch.int64).numpy().tobytes() for name in ("input_ids", "labels"))
    found = {"digest.text": _digest((ids, b"|", labels))}
    if pixels:
        seen = bool((sample["input_ids"] == IMAGE_TOKEN_INDEX).any())
        image = sample["image"].contiguous() if seen else torch.zeros(0)
        shape = repr((tuple(image.shape), str(image.dtype))).encode()
        found["digest.pixels"] = _digest((shape, image.numpy().tobytes()))
    return found


def _digest(parts: Sequence[bytes]) -> np.ndarray:
    digest = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return np.frombuffer(digest.digest(), np.uint8)


def merged(sample: Mapping[str, Any], patches: int, limit: int | None, pad: int | None = None) -> MergedBatch:
    """A sample alone, with `patches` visual tokens in an image's place and cut at the limit, as LLaVA merges it: it
    leaves out the padding token `pad` also where a text spells out its name."""
    kept = sample["input_ids"] != (-1 if pad is None else pad)
    ids, labels = sample["input_ids"][kept], sample["labels"][kept]
    is_image = ids == IMAGE_TOKEN_INDEX
    widths = torch.where(is_image, patches, 1)
    visual = is_image.repeat_interleave(widths)[:limit]
    labels = labels.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(widths)[:limit]
    return MergedBatch(labels[None], torch.ones_like(visual)[None], visual.nonzero().view(1, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def make_entries(found: Pass, what: What) -> list[dict[str, np.ndarray]]:
    """A teacher's pass over a batch, sample by sample, without digests.

    Raises:
        FloatingPointError: for a map or a distribution that is not finite.
    """
    batch = found.batch
    rows = batch.attention_rows(what.rows)
    columns = (batch.visual_index >= 0).sum(dim=1).tolist()
    answers, counts = batch.answer_mask().sum(dim=1).tolist(), rows.sum(dim=1).tolist()
    entries: list[dict[str, np.ndarray]] = [
        {"sizes": np.array(sizes, np.int64)} for sizes in zip(answers, counts, columns, strict=True)
    ]
    if what.answers:
        head = found.head["answer"]
        weight, bias = head.weights
        options = {"bias": bias, "temperature": what.temperature, "vocab_size": what.vocab}
        top = top_tokens(head.hidden, weight, what.top_k, **options)
        _refuse_broken(top.log_probs, "log-probabilities")
        codes, ends = quantise_log_probs(top.log_probs, what.logit_bits)
        parts = [part.cpu().split(answers) for part in (top.tokens, codes, ends, top.rest.float())]
        for entry, tokens, code, end, rest in zip(entries, *parts, strict=True):
            entry |= _narrow_tokens(tokens.numpy().ravel(), what.vocab)
            entry["top.codes"] = code.numpy().ravel().astype(_STORED[what.logit_bits])
            entry["top.ends"], entry["top.rest"] = end.numpy().ravel(), rest.numpy()
    for group in what.groups:
        if group not in found.maps:  # a batch without an image
            continue
        for sample, entry in enumerate(entries):
            attention = found.maps[group][sample][rows[sample]][:, : columns[sample]]
            _refuse_broken(attention, f"attention maps of the layers {list(group)}")
            codes, peaks = quantise_map(attention, what.map_bits)
            mask, stored = packed(codes.cpu().numpy(), what.map_bits)
            name = map_name(group)
            entry |= {f"{name}.mask": mask, f"{name}.codes": stored, f"{name}.peaks": peaks.cpu().numpy()}
    return entries


_STORED = {8: np.uint8, 16: np.uint16, 32: np.float32}


def _refuse_broken(values: torch.Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"the teacher's {what} are NaN or infinite")


def token_bytes(vocab: int) -> int:
    """Bytes of a token's number."""
    return 2 if vocab <= 1 << 16 else 3


def _narrow_tokens(tokens: np.ndarray, vocab: int) -> dict[str, np.ndarray]:
    found = {"top.tokens": (tokens & 0xFFFF).astype(np.uint16)}
    if token_bytes(vocab) == 3:
        found["top.high"] = (tokens >> 16).astype(np.uint8)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def as_tensors(entry: Entry, what: What) -> dict[str, torch.Tensor]:
    """An entry as a worker that loads data hands it out: codes in full, and whole numbers throughout. DeepSpeed rounds
    what it is given in floating point to the precision of the step; float32 goes as the integers of the same bits.
    """
    found: dict[str, torch.Tensor] = {}
    _, rows, columns = entry["sizes"].tolist()
    if what.answers:
        tokens = entry["top.tokens"].astype(np.int32)
        if "top.high" in entry:
            tokens |= entry["top.high"].astype(np.int32) << 16
        found["top.tokens"] = torch.from_numpy(tokens)
        for name in ("top.codes", "top.ends", "top.rest"):
            found[name] = _whole(entry[name])
    for name in map(map_name, what.groups):
        if f"{name}.codes" in entry and columns:
            codes = unpacked(entry[f"{name}.mask"], entry[f"{name}.codes"], what.map_bits, rows * columns)
            found |= {f"{name}.codes": _whole(codes), f"{name}.peaks": _whole(entry[f"{name}.peaks"])}
    return found


def _whole(values: np.ndarray) -> torch.Tensor:
    if values.dtype == np.float32:
        return torch.from_numpy(np.array(values)).view(torch.int32)
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else np.array(values))


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `as_tensors` gives of samples, one after the other."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: torch.cat([sample[name] for sample in samples if name in sample]) for name in names}


def read_pass(cached: Mapping[str, torch.Tensor], batch: MergedBatch, what: What) -> Pass:
    """The teacher's pass over a batch.

    Args:
        cached: what `collate` gives, on the batch's device.
        batch: where the student's tokens are, which are the teacher's.
    """
    found = Pass(batch)
    if what.answers:
        rest = cached["top.rest"].view(torch.float32)
        tokens = cached["top.tokens"].view(len(rest), what.top_k)
        codes = cached["top.codes"].view(tokens.shape)
        codes = codes.view(torch.float32) if what.logit_bits == 32 else codes
        ends = cached["top.ends"].view(len(rest), 0 if what.logit_bits == 32 else 2).view(torch.float32)
        log_probs = restore_log_probs(codes, ends, what.logit_bits)
        top = TopTokens(tokens.long(), *renormalise(log_probs, rest))
        found.top = TopRows(top, batch.answer_targets())
    if batch.visual_index.shape[1]:
        rows, columns = batch.attention_rows(what.rows), batch.visual_index >= 0
        places = rows[:, :, None] & columns[:, None, :]
        heights = rows & columns.any(dim=1, keepdim=True)
        for group in what.groups:
            codes, peaks = (cached[f"{map_name(group)}.{part}"] for part in ("codes", "peaks"))
            found.maps[group] = _placed(codes, peaks, places, heights, what.map_bits)
    return found


def _placed(
    codes: torch.Tensor, peaks: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, bits: int
) -> torch.Tensor:
    """[B, N, N_v] float32, 0 where a cache has no entry. Nothing here waits for the device.

    Args:
        places: [B, N, N_v] bool, of the codes in their order.
        rows: [B, N] bool, of the peaks.
    """
    if bits == 32:
        codes = codes.view(torch.float32)
    whole = codes.new_zeros(places.shape).masked_scatter_(places, codes)
    if bits == 32:
        return whole
    peaks = peaks.view(torch.float32)
    return restore_map(whole, peaks.new_zeros(rows.shape).masked_scatter_(rows, peaks), bits)
