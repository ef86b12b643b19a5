"""Suite teacher: what each --teacher_placement that one process can have costs, and what it does to what is taught.

The teacher's pass is that of DFT: hidden states at the answer rows and the mean maps of its middle layers. 8bit and
4bit need bitsandbytes. With random weights, KL and cosine say whether a placement works, not what it costs a trained
teacher's students: for that, see the suite dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from measure import compare, extra_memory
from pair import Pair
from step import columns

from llava_compodistill.errors import FlagError
from llava_compodistill.pair.layers import visual_understanding_layers
from llava_compodistill.pair.placement import QUANTISED, place_teacher
from llava_compodistill.pair.teacher import load_teacher
from llava_compodistill.record.forward import Needs, Pass, record
from llava_compodistill.train.checkpoint import save_whole

PLACEMENTS = ("replicate", "offload", "8bit", "4bit")


def targets(teacher: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Pass:
    """What a teacher gives for a batch."""
    layers = visual_understanding_layers(teacher.config.num_hidden_layers, "intermediate")
    needs = Needs(head=frozenset({"answer"}), groups=frozenset((layer,) for layer in layers))
    with torch.no_grad(), record(teacher, needs) as recorder:
        teacher(**batch, use_cache=False)
        return recorder.latest


def effect(whole: Pass, other: Pass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL in nats from the whole teacher's distribution of an answer token to the other's, [R]; cosine of their
    attention maps, at each query with an image before it of each group and sample; whether both find the same token
    the likeliest, [R]), on the CPU."""
    logits = []
    for found in (whole, other):
        weight, bias = found.head["answer"].weights
        logits.append(torch.nn.functional.linear(found.head["answer"].hidden, weight, bias).float().log_softmax(-1))
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float()
    rows = whole.batch.attention_rows()
    cosines = [
        torch.cosine_similarity(attention.float(), other.maps[group].float(), dim=-1)[rows]
        for group, attention in whole.maps.items()
    ]
    return kl.cpu(), torch.cat(cosines).cpu(), same.cpu()


def on_device(teacher: torch.nn.Module) -> float:
    """MiB of weights that stay on the device between two passes, without the encoder's."""
    kept = [p for n, p in teacher.named_parameters() if not p.is_meta and "vision_tower" not in n]
    return sum(p.numel() * p.element_size() for p in kept) / 2**20


def run(pair: Pair, folder: str, batches: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each placement, length and micro-batch; of a placement that cannot run here, the reason."""
    source = f"{folder}/teacher"
    save_whole(pair.teacher, source)
    dtype, device = pair.spec.dtype, pair.device
    for placement in PLACEMENTS:
        for length in pair.spec.lengths:
            for size in batches:
                row = {**columns(pair, size, length), "suite": "teacher", "variant": placement}
                try:
                    teacher = load_teacher(source, dtype=dtype, device=device, placement=placement)
                except FlagError as error:
                    yield {**row, "note": f"not run: {error}"}
                    continue
                place_teacher(teacher, placement, device)
                batch = pair.batch(size, length)
                whole, found = targets(pair.teacher, batch), targets(teacher, batch)
                kl, cosine = (values.mean().item() for values in effect(whole, found)[:2])
                note = f"{on_device(teacher):.1f} MiB of weights on the device, KL {kl:.2g}, cosine {cosine:.4f}"
                if placement not in QUANTISED:
                    apart = (found.head["answer"].hidden - whole.head["answer"].hidden).abs().max().item()
                    row["parity"] = f"{apart:.1e}" if apart < 1e-4 else f"FAILED {apart:.1e}"
                del whole, found
                row["extra_mib"] = extra_memory(lambda: targets(teacher, batch), device)  # noqa: B023
                work = {placement: lambda: targets(teacher, batch)}  # noqa: B023
                p20, p50, p80 = compare(work, device, seconds)[placement]
                yield {**row, "note": note, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
