"""Suite sight: what the sight guard of `llava_compodistill.train.sight` costs beside the training that it watches.

One measurement is `--sight_samples` forwards of the student with the samples' own images and as many with others', by
the guard's own code. The share of a run is its time over that of 200 optimizer steps. A step is taken as
forward and backward of its micro-batches, without the optimizer, so that the share is rather too large than too small.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from measure import compare
from pair import Pair
from step import columns, our_step

from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.sight import STEPS, SightGuard

SAMPLES = TrainingArguments.__dataclass_fields__["sight_samples"].default
#: With a teacher, without one, and without one and with the adapter alone, where a step does least.
STAGES = ("dft", "sft", "pt")


def guard(pair: Pair, size: int, length: int) -> SightGuard:
    """The guard over a pair's student, with batches of a run whose micro-batch is `size`."""
    trainer = SimpleNamespace(
        model_wrapped=pair.student,
        accelerator=SimpleNamespace(num_processes=1),
        _prepare_inputs=lambda batch: batch,
    )
    found = SightGuard(trainer)
    sizes = [min(size, SAMPLES - start) for start in range(0, SAMPLES, size)]
    batches = [pair.batch(each, length) for each in sizes]
    # A flipped image is another's; the text is the same.
    found._batches = [(batch, {**batch, "images": batch["images"].flip(-1)}) for batch in batches]
    return found


def trained(pair: Pair, folder: str, stage: str, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A stage's micro-batch; in pt with the language model frozen."""
    step = our_step(pair, folder, stage=stage)
    rest = [p for name, p in pair.student.named_parameters() if p.requires_grad and "mm_projector" not in name]

    def call() -> None:
        for parameter in rest:
            parameter.requires_grad_(stage != "pt")
        try:
            step(batch)
        finally:
            for parameter in rest:
                parameter.requires_grad_(True)

    return call


def run(pair: Pair, folder: str, batches: list[int], seconds: float, global_batch: int) -> Iterator[dict[str, Any]]:
    """The cost in runs with and without a teacher, at the lengths and micro-batches of a preset.

    Args:
        global_batch: samples of an optimizer step.
    """
    # A neighbour on the machine takes wall time, but no CPU time of this process.
    clock = time.process_time if pair.device.type == "cpu" else time.perf_counter
    for length in pair.spec.lengths:
        for size in batches:
            batch, watch = pair.batch(size, length), guard(pair, size, length)
            if len(watch.measure()) != SAMPLES:
                raise SystemExit(f"the guard measured {len(watch.measure())} of {SAMPLES} samples")
            work = {stage: trained(pair, folder, stage, batch) for stage in STAGES}
            times = compare({**work, "measurement": watch.measure}, pair.device, seconds, rounds=3, clock=clock)
            cost = times["measurement"][1]
            for name, (p20, p50, p80) in times.items():
                row = {**columns(pair, size, length), "suite": "sight", "variant": name}
                if name in work:
                    share = cost / (STEPS * p50 * global_batch / size)
                    row["sight_share"] = share
                    row["note"] = f"{100 * share:.2f} % with {global_batch} samples a step"
                yield {**row, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
                pair.student.zero_grad(set_to_none=False)
