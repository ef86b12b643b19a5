"""Suite plan: what `llava-compodistill plan` predicts beside what is measured, stage by stage.

Memory is counted as PyTorch's allocator sees it: the tensors that are there before a micro-batch (weights, gradients,
optimizer states), and the highest that a micro-batch and the optimizer's step rise above them. The reserve, which is
an assumption, is left out on both sides.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import extra_memory, synchronize
from pair import Pair, PairSpec
from step import columns, our_step

from llava_compodistill.pair.student import add_lora, set_trainable
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.plan import flops, memory


@dataclass(frozen=True)
class Case:
    """A stage as it may run.

    Attributes:
        precision: fp32; bf16 with autocast over float32 weights, as without DeepSpeed; or "bf16 weights", as under
            DeepSpeed, whose optimizer is left out.
        accumulated: whether the micro-batch finds gradients of another.
    """

    stage: str
    batch: int
    lora: int = 0
    checkpointing: bool = False
    maps: bool = True
    precision: str = "fp32"
    accumulated: bool = True

    @property
    def title(self) -> str:
        parts = [self.stage.upper(), f"LoRA {self.lora}" if self.lora else "", "" if self.maps else "without maps"]
        parts += ["checkpointing" if self.checkpointing else "", "" if self.precision == "fp32" else self.precision]
        return ", ".join([*filter(None, parts), *([] if self.accumulated else ["one micro-batch"])])

    def setup(self, spec: PairSpec, length: int, device: str) -> memory.Setup:
        distils = self.stage in ("dpt", "dft")
        return memory.Setup(
            trains_llm=self.stage != "dpt",
            distils=distils,
            aligns=self.stage == "dft" and self.maps,
            lora_rank=self.lora,
            dtype="fp32" if self.precision == "fp32" else "bf16",
            zero=2 if self.precision == "bf16 weights" else 0,
            checkpointing=self.checkpointing,
            batch=self.batch,
            length=length,
            rows=self.batch * spec.answers,
            accumulation=2 if self.accumulated else 1,
            whole_vocabulary=True,
            device=device,
        )


CASES = (
    Case("dpt", 4, checkpointing=True),
    Case("dpt", 4),
    Case("dft", 4, checkpointing=True),
    Case("dft", 2),
    Case("dft", 4, maps=False),
    Case("dft", 2, accumulated=False),
    Case("dft", 4, lora=32, checkpointing=True),
    Case("dft", 2, lora=32),
    Case("sft", 4),
    Case("sft", 4, lora=32),
    Case("dft", 4, precision="bf16 weights"),
    Case("dft", 4, checkpointing=True, precision="bf16 weights"),
    Case("dft", 2, precision="bf16 autocast"),
    Case("dft", 4, lora=32, precision="bf16 autocast"),
)


def predicted(spec: PairSpec, setup: memory.Setup) -> tuple[float, float, str]:
    """(bytes at the peak, bytes there before the micro-batch, the peak's moment)."""
    sizes = spec.models
    moments = memory.phases(sizes, setup)
    before = memory.resident(sizes, setup)
    grown = memory.gradients(sizes, setup) if setup.accumulation > 1 else 0.0
    left_out = 0.0
    if setup.zero:
        # The optimizer that DeepSpeed would run, and its buckets, are not there.
        moments.pop("step")
        left_out = before.pop("optimizer states")
        for terms in moments.values():
            terms.pop("gradient buckets", None)
    name = max(moments, key=lambda key: sum(moments[key].values()))
    return sum(moments[name].values()) - left_out, sum(before.values()) + grown, name


def bytes_of(tensors: Any) -> int:
    """Of storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure(spec: PairSpec, case: Case, device: torch.device, folder: str, length: int) -> dict[str, float]:
    """Bytes before a micro-batch, by term and in all, and at the peak; trained weights; seconds of the micro-batch."""
    arguments = TrainingArguments(
        output_dir=folder, report_to="none", use_cpu=device.type == "cpu", stage=case.stage,
        lora_enable=bool(case.lora), lora_r=case.lora or 64,
    )  # fmt: skip
    pair = Pair(spec, device, Path(folder), checkpointing=case.checkpointing)
    if case.lora:
        pair.student = add_lora(pair.student, arguments)
    set_trainable(pair.student, case.stage)
    if case.checkpointing:
        pair.student.enable_input_require_grads()
    if case.precision == "bf16 autocast":
        if not case.lora:
            pair.student.get_model().layers.float()
            for part in (pair.student.get_model().embed_tokens, pair.student.get_model().norm, pair.student.lm_head):
                part.float()
        for parameter in pair.student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        pair.student.forward = torch.autocast(device.type, dtype=torch.bfloat16)(pair.student.forward)
    step = our_step(pair, folder, stage=case.stage, vat=case.maps)
    batch = pair.batch(case.batch, length)
    if case.stage == "sft":
        pair.teacher = None
    trained = [parameter for parameter in pair.student.parameters() if parameter.requires_grad]
    optimizer = None if case.precision == "bf16 weights" else torch.optim.AdamW(trained, lr=1e-4)
    begin = time.perf_counter()
    step(batch)
    synchronize(device)
    first = time.perf_counter() - begin
    if optimizer is not None:
        optimizer.step()
    if not case.accumulated:
        pair.student.zero_grad(set_to_none=True)
    held = [p for model in filter(None, (pair.student, pair.teacher)) for p in model.parameters()]
    parts = {
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": bytes_of(held),
        "gradients": bytes_of(parameter.grad for parameter in trained if parameter.grad is not None),
        "optimizer": 0,
    }
    if optimizer is not None:
        states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        parts["optimizer"] = bytes_of(states)
    seconds = []

    def call() -> None:
        begin = time.perf_counter()
        step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        if optimizer is not None:
            optimizer.step()
        if not case.accumulated:  # on CUDA this runs twice, and `before` has no gradients
            pair.student.zero_grad(set_to_none=True)

    before = parts["weights"] + parts["gradients"] + parts["optimizer"]
    peak = before + extra_memory(call, device) * 2**20
    return {**parts, "before": before, "peak": peak, "seconds": min(first, *seconds)}


def run(
    spec: PairSpec, device: torch.device, folder: str, cases: Sequence[Case] = CASES
) -> Iterator[tuple[dict[str, Any], float, float]]:
    """For each case a row, the FLOPs that its micro-batch executes, and its seconds."""
    length = spec.lengths[0]
    for case in cases:
        dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
        sized = PairSpec(spec.teacher, spec.student, spec.tower, spec.answers, dtype, spec.lengths)
        setup = case.setup(sized, length, device.type)
        peak, before, moment = predicted(sized, setup)
        found = measure(sized, case, device, folder, length)
        gc.collect()
        executed = flops.executed(sized.models, setup, length, setup.rows / case.batch) * case.batch
        step = (found["peak"] - found["before"], peak - before)
        size = Pair.__new__(Pair)  # for its sizes alone: the models are gone
        size.spec = sized
        yield (
            {
                **columns(size, case.batch, length),
                "suite": "plan",
                "variant": case.title,
                "p50_ms": 1e3 * found["seconds"],
                "measured_mib": found["peak"] / 2**20,
                "predicted_mib": peak / 2**20,
                "error": peak / found["peak"] - 1,
                "step_error": step[1] / step[0] - 1,
                "extra_mib": step[0] / 2**20,
                "note": f"predicted peak: {memory.PHASES[moment]}",
            },
            executed,
            found["seconds"],
        )


def calibration(rows: list[tuple[dict[str, Any], float, float]], origin: dict[str, str]) -> dict[str, Any]:
    """What `llava-compodistill plan --calibration` reads: FLOP/s by stage, the medians over the cases."""
    rates: dict[str, list[float]] = {}
    for row, executed, seconds in rows:
        rates.setdefault(row["variant"].split(",")[0].lower(), []).append(executed / seconds)
    return {"flops_per_second": {stage: statistics.median(found) for stage, found in rates.items()}, **origin}
