"""Suite pack: what padding costs at the lengths of LLaVA's instruction data, and what layers without it save.

The lengths are simulated. What is published of llava_v1_5_mix665k: how many samples each source has, that questions
about one image are put into one conversation, that ShareGPT is text alone, and that sequences are cut at 2,048. What
is assumed: text tokens of a source are log-normal with the medians and spreads of `SOURCES`, which follow from rounds
per image (VQAv2 has 5.3 questions an image, GQA 13, OCR-VQA 4.8; RefCOCO and VG fewer than 10 rounds with boxes) and
from about 40 tokens of system prompt.

Shares of padding need no model and are of the real lengths. Steps are timed with the preset's models: lengths are
scaled by their number of visual tokens, so that the shares are about the same. Every variant makes one optimizer step
of the same samples, so their gradients must agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import compare
from pair import IGNORE_INDEX, IMAGE_TOKEN, Kept, Pair
from step import columns, objective

from llava_compodistill.train.packing import make_packs
from llava_compodistill.train.samplers import SeededLengthGroupedSampler

#: (source, thousands of samples, whether they have an image, median and spread of their text tokens)
SOURCES = (
    ("LLaVA-Instruct", 158, True, 240, 0.45),
    ("ShareGPT", 40, False, 1100, 0.8),
    ("VQAv2", 83, True, 130, 0.3),
    ("GQA", 72, True, 275, 0.4),
    ("OKVQA", 9, True, 85, 0.2),
    ("OCR-VQA", 80, True, 150, 0.25),
    ("A-OKVQA", 66, True, 100, 0.15),
    ("TextCaps", 22, True, 110, 0.3),
    ("RefCOCO", 48, True, 280, 0.5),
    ("VG", 86, True, 330, 0.4),
)
LIMIT, VISUAL = 2048, 576
#: Samples that shares of padding are counted on, and the samples of an optimizer step there.
SAMPLES, GLOBAL_BATCH = 20_000, 128
BATCHES = (4, 8, 16)
#: Samples of the step that is timed.
STEP = 24
#: Ways to form micro-batches.
PLAIN, BY_LLAVA, BY_LENGTH = "padded, random order", "padded, --group_by_modality_length", "padded, sorted by length"
FREE, PACKED = "--padding_free, random order", "--pack_length"


@dataclass(frozen=True)
class Sample:
    """Tokens of a sample: `text` beside the visual ones, `length` of both."""

    text: int
    visual: int

    @property
    def length(self) -> int:
        return self.text + self.visual


def draw(count: int, visual: int, seed: int = 0) -> list[Sample]:
    """Samples of the mix; with other visual tokens than 576, text and limit are scaled with them."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([thousands for _, thousands, *_ in SOURCES], dtype=torch.float64)
    source = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
    spread = torch.randn(count, generator=generator).tolist()
    scale, samples = visual / VISUAL, []
    for number, normal in zip(source, spread, strict=True):
        _, _, has_image, median, deviation = SOURCES[number]
        image = visual if has_image else 0
        most = round(LIMIT * scale) - image
        samples.append(Sample(max(8, min(round(scale * median * math.exp(deviation * normal)), most)), image))
    return samples


def grouped(samples: Sequence[Sample], size: int, policy: str, step: int, room: int) -> list[list[int]]:
    """The micro-batches of a policy.

    Args:
        size: samples of a padded micro-batch.
        step: samples of an optimizer step.
        room: tokens of a pack.
    """
    places = list(range(len(samples)))
    if policy == PACKED:
        return make_packs([sample.length for sample in samples], room, seed=0)
    if policy == BY_LLAVA:  # by words, images left out, as LLaVA counts
        lengths = [sample.text if sample.visual else -sample.text for sample in samples]
        places = list(
            SeededLengthGroupedSampler(size, max(1, step // size), lengths=lengths, group_by_modality=True, seed=0)
        )
    elif policy == BY_LENGTH:  # as transformers' group_by_length
        window = 50 * size
        places = [
            place
            for start in range(0, len(places), window)
            for place in sorted(places[start : start + window], key=lambda place: -samples[place].length)
        ]
    return [places[start : start + size] for start in range(0, len(places), size)]


def padding_share(samples: Sequence[Sample], batches: Sequence[Sequence[int]]) -> float:
    """The share of the positions of padded batches that are padding."""
    real = sum(samples[place].length for batch in batches for place in batch)
    computed = sum(len(batch) * max(samples[place].length for place in batch) for batch in batches)
    return 1 - real / computed


def shares() -> Iterator[dict[str, Any]]:
    """Padding by policy and micro-batch, without a model."""
    samples = draw(SAMPLES, VISUAL)
    mean = sum(sample.length for sample in samples) / len(samples)
    for size in BATCHES:
        row = {"suite": "pack", "batch": size, "length": LIMIT, "visual": VISUAL}
        for policy in (PLAIN, BY_LLAVA, BY_LENGTH):
            share = padding_share(samples, grouped(samples, size, policy, GLOBAL_BATCH, LIMIT))
            yield {**row, "variant": policy, "padding_share": share, "note": f"{mean:.0f} tokens a sample"}
    packs = grouped(samples, 1, PACKED, GLOBAL_BATCH, LIMIT)
    full = mean * len(samples) / len(packs) / LIMIT
    note = f"{len(samples) / len(packs):.2f} samples a pack, {100 * full:.1f} % full"
    yield {**row, "batch": 1, "variant": PACKED, "padding_share": 0.0, "note": note}


def collate(pair: Pair, samples: Sequence[Sample], places: Sequence[int]) -> dict[str, torch.Tensor]:
    """What LLaVA's collator gives of some of the samples: a third of the text is answers; text alone has an empty
    image."""
    rows, pixels = [], pair.spec.tower.pixels
    for place in places:
        generator = torch.Generator().manual_seed(place)
        sample = samples[place]
        ids = torch.randint(2, pair.spec.student.vocab, (sample.text,), generator=generator)
        labels = ids.clone()
        labels[: -max(1, sample.text // 3)] = IGNORE_INDEX
        if sample.visual:
            ids, labels = (torch.cat([part[:1], torch.tensor([new]), part[1:]]) for part, new in (
                (ids, IMAGE_TOKEN), (labels, IGNORE_INDEX),
            ))  # fmt: skip
        image = torch.rand(3, pixels, pixels, generator=generator) * 2 - 1 if sample.visual else None
        rows.append((ids, labels, torch.zeros(3, pixels, pixels) if image is None else image))
    ids, labels, images = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(ids, batch_first=True, padding_value=0)
    batch = {
        "input_ids": ids,
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": ids != 0,
    }
    batch["images"] = torch.stack(images).to(pair.spec.dtype)
    return {name: value.to(pair.device) for name, value in batch.items()}


def optimizer_step(
    pair: Pair, folder: str, batches: Sequence[dict[str, torch.Tensor]], padding_free: bool
) -> Callable[[], float]:
    """Forward and backward of all micro-batches of a step; returns its loss."""
    goal = objective(pair, folder, padding_free=padding_free)
    known = [Kept(pair.spec.tower.patches) for _ in batches]
    counts = {
        "answer_tokens": sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches),
        "image_samples": sum(int((batch["input_ids"] == IMAGE_TOKEN).any(dim=1).sum()) for batch in batches),
    }

    def step() -> float:
        total = torch.zeros((), device=pair.device)
        for batch, here in zip(batches, known, strict=True):
            with goal.running(), here(batch):
                sums = goal(pair.student, {**batch, "use_cache": False})
                parts = [term.weight * sums[term.name].loss / counts[term.count] for term in goal.terms
                         if sums[term.name].loss is not None]  # fmt: skip
                loss = sum(parts)
                loss.backward()
            total += loss.detach()
        return total.item()

    return step


def gradient_of(pair: Pair, step: Callable[[], float]) -> torch.Tensor:
    pair.student.zero_grad(set_to_none=True)
    step()
    found = torch.cat([p.grad.flatten().float() for p in pair.student.parameters() if p.grad is not None])
    pair.student.zero_grad(set_to_none=True)
    return found


def run(pair: Pair, folder: str, batches: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Shares of padding; then useful tokens a second of one optimizer step, by policy.

    Args:
        batches: micro-batches of the padded variants; packs have the tokens of the longest sample.
    """
    yield from shares()
    visual = pair.spec.tower.patches
    samples = draw(STEP, visual)
    tokens, room = sum(sample.length for sample in samples), round(LIMIT * visual / VISUAL)
    for size in batches:
        steps, rows, truth = {}, {}, None
        for policy in (PLAIN, BY_LLAVA, BY_LENGTH, FREE, PACKED):
            order = PLAIN if policy == FREE else policy
            groups = grouped(samples, size, order, STEP, room)
            free = policy in (FREE, PACKED)
            made = [collate(pair, samples, group) for group in groups]
            steps[policy] = optimizer_step(pair, folder, made, free)
            gradient = gradient_of(pair, steps[policy])
            truth = gradient if truth is None else truth
            error = ((gradient - truth).norm() / truth.norm()).item()
            if error > (1e-3 if pair.spec.dtype == torch.float32 else 0.05):
                raise SystemExit(f"parity failed: the gradient of {policy} differs by {error:.2g} of its norm")
            share = 0.0 if free else padding_share(samples, groups)
            note = f"one optimizer step of {STEP} samples in {len(groups)} micro-batches"
            rows[policy] = {"parity": f"{error:.1e}", "padding_share": share, "note": note}
        # In CPU time on a CPU, as a machine that does other work beside allows it.
        clock = time.process_time if pair.device.type == "cpu" else time.perf_counter
        times = compare(steps, pair.device, seconds, rounds=3, clock=clock)
        for policy, (p20, p50, p80) in times.items():
            row = {**columns(pair, size, room), "suite": "pack", "variant": policy, **rows[policy]}
            row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
            yield {**row, "samples_per_s": 1e3 * STEP / p50, "tokens_per_s": 1e3 * tokens / p50}
        pair.student.zero_grad(set_to_none=True)
