"""Suite cache: a DFT step with the teacher and with what a cache holds of it, and what a sample takes by options.

The cached step is measured as training runs it: the batch holds codes, which are restored on the device. What comes
before it is a row of its own, since workers that load data do it beside the step: reading an entry from its shard and
unpacking it. So is what comes once: the teacher's pass, the entries and their shard. Each variant's loss and gradients
are compared with the live teacher's; with all tokens and 32 bits they have to agree.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import compare, extra_memory
from pair import IGNORE_INDEX, Kept, Pair
from step import columns, gradients, our_step

from llava_compodistill.methods import find_method
from llava_compodistill.pair.tokens import TEACHER
from llava_compodistill.record.encoding import encode_alone
from llava_compodistill.record.forward import Needs, record
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.cache import entries, shards
from llava_compodistill.train.cache.read import wanted_of
from llava_compodistill.train.cache.teacher import CachedTeacher
from llava_compodistill.train.objective import Objective

#: (top_k, logit_bits, rows, map_bits): None for all tokens.
OPTIONS = ((None, 32, "all", 32), (64, 8, "all", 8), (64, 8, "all", 4), (16, 8, "all", 4), (64, 8, "answer", 8))


def run(pair: Pair, folder: str, batches: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows for each length and micro-batch: the step with the teacher; by options, that from a cache, and what reading
    and making take. All of them take turns."""
    for length in pair.spec.lengths:
        for size in batches:
            batch = pair.batch(size, length)
            live = our_step(pair, folder)
            truth = gradients(pair, live, batch)
            work: dict[str, Callable[[], Any]] = {"with the teacher": lambda: live(batch)}  # noqa: B023
            rows: dict[str, dict[str, Any]] = {}
            for options in OPTIONS:
                name, row, step, read, make = _cached(pair, folder, batch, options, truth)
                work |= {name: step, f"reading: {name}": read, f"making: {name}": make}
                rows[name] = row
            times = compare(work, pair.device, seconds)
            for name, call in work.items():
                p20, p50, p80 = times[name]
                row = {**columns(pair, size, length), "suite": "cache", "variant": name, **rows.get(name, {})}
                row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
                if not name.startswith(("reading", "making")):
                    row |= {"extra_mib": extra_memory(call, pair.device), "samples_per_s": 1e3 * size / p50}
                yield row
            pair.student.zero_grad(set_to_none=False)


def _cached(
    pair: Pair,
    folder: str,
    batch: dict[str, torch.Tensor],
    options: tuple[int | None, int, str, int],
    truth: tuple[float, dict[str, torch.Tensor]],
) -> tuple[str, dict[str, Any], Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Of one set of options: its name, what is known before it is timed, the step, what reads a batch from its shard,
    and what makes that shard."""
    top_k, logit_bits, rows, map_bits = options
    vocab, size = pair.spec.student.vocab, len(batch["input_ids"])
    chosen = {"top_k": top_k or vocab, "logit_bits": logit_bits, "map_bits": map_bits}
    goal, known = _objective(pair, folder, rows, chosen), Kept(pair.spec.tower.patches)
    what = goal.pair.teacher.what

    def make() -> Path:
        return shards.write_shard(Path(tempfile.mkdtemp(dir=folder)), 0, _entries(pair, batch, what))

    path = make()
    shard = shards.Shard(path)

    def read() -> dict[str, torch.Tensor]:
        return entries.collate([entries.as_tensors(shard.read(place), what) for place in range(size)])

    cached = {name: value.to(pair.device) for name, value in read().items()}

    def step(inputs: dict[str, torch.Tensor] = batch) -> torch.Tensor:
        counts = {"answer_tokens": (inputs["labels"] != IGNORE_INDEX).sum(), "image_samples": size}
        with goal.running(), known(inputs):
            sums = goal(pair.student, {**inputs, TEACHER: cached, "use_cache": False})
            loss = sum(term.weight * sums[term.name].loss / counts[term.count] for term in goal.terms)
            loss.backward()
        return loss.detach()

    name = f"{'all' if top_k is None else top_k} tokens, {logit_bits} bits; {rows} rows, {map_bits} bits"
    loss, found = gradients(pair, step, batch)
    apart = sum((found[n].float() - g.float()).norm().item() ** 2 for n, g in truth[1].items()) ** 0.5
    whole = sum(g.float().norm().item() ** 2 for g in truth[1].values()) ** 0.5
    error = max(abs(loss - truth[0]) / abs(truth[0]), apart / whole)
    each = path.stat().st_size / size
    row = {"note": f"{each / 1e3:,.4g} kB a sample, {error:.1e} from the teacher's loss or gradients"}
    if top_k is None and rows == "all" and map_bits == 32:
        limit = 1e-3 if pair.spec.dtype == torch.float32 else 0.05
        row["parity"] = f"FAILED {error:.1e}" if error > limit else f"{error:.1e}"
    return name, row, step, read, lambda: shutil.rmtree(make().parent)


def _objective(pair: Pair, folder: str, rows: str, chosen: dict[str, int]) -> Objective:
    """The step's own, with a teacher that is not there."""
    options = {"stage": "dft", "attention_rows": rows, "use_cpu": pair.device.type == "cpu"}
    arguments = TrainingArguments(output_dir=folder, report_to="none", **options)
    vocab = pair.spec.student.vocab

    def goal(teacher: Any) -> Objective:
        terms = find_method("compodistill").terms("dft", arguments)
        return Objective(pair.student, teacher, terms, vocab, arguments.attention_map_impl)

    what = wanted_of(goal(pair.teacher).terms, arguments, vocab, **chosen)
    return goal(CachedTeacher(pair.teacher.config, pair.teacher.get_vision_tower(), what))


def _entries(pair: Pair, batch: dict[str, torch.Tensor], what: entries.What) -> list[dict[str, Any]]:
    needs = Needs(head=frozenset({"answer"}), groups=frozenset(what.groups))
    with torch.no_grad(), encode_alone(pair.teacher), record(pair.teacher, needs) as recorder:
        pair.teacher(**batch, use_cache=False)
        return entries.make_entries(recorder.latest, what)
