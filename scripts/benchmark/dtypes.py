"""Suite dtype: what each --teacher_dtype makes of a trained teacher's targets, and what it costs.

The teacher and the samples are those of a DFT command line, by default the miniature's trained teacher on its data.
Beside each precision the float32 teacher reads the same batches: KL of the distributions at the answer rows, cosine of
the mean maps of the aligned layers, as the losses would take them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import compare, extra_memory
from teacher import effect

from llava_compodistill.errors import CompoDistillError
from llava_compodistill.pair.placement import weights_bytes
from llava_compodistill.pair.student import computing
from llava_compodistill.record.encoding import encode_alone
from llava_compodistill.record.forward import Needs, Pass, record
from llava_compodistill.train.cache import make
from miniature import weights
from miniature.dataset import WorldConfig, write_dataset
from miniature.settings import VERSION

#: name -> flags. All but the first two compute in bfloat16.
VARIANTS = {
    "float32": ("--teacher_dtype", "float32", "--bf16", "False", "--fp16", "False"),
    "float16": ("--teacher_dtype", "float16", "--bf16", "False", "--fp16", "True"),
    "bfloat16": ("--teacher_dtype", "bfloat16", "--bf16", "True", "--fp16", "False"),
    "float8": ("--teacher_dtype", "float8", "--bf16", "True", "--fp16", "False"),
    "8bit": ("--teacher_dtype", "auto", "--bf16", "True", "--fp16", "False", "--teacher_placement", "8bit"),
    "4bit": ("--teacher_dtype", "auto", "--bf16", "True", "--fp16", "False", "--teacher_placement", "4bit"),
}


def miniature(folder: Path) -> list[str]:
    """The command line of the miniature's DFT."""
    write_dataset(folder / "data", WorldConfig.preset("smoke", instruct_student=512), progress=False)
    weights.install(folder / "models")
    given = {
        "--stage": "dft",
        "--model_name_or_path": folder / "models" / "qwen-student",
        "--teacher_model_path": folder / "models" / "llava-teacher",
        "--vision_tower": folder / "models" / "siglip",
        "--version": VERSION,
        "--data_path": folder / "data" / "instruct_student.json",
        "--image_folder": folder / "data" / "images",
        "--mm_projector_type": "taf",
        "--per_device_train_batch_size": 32,
        "--model_max_length": 1024,
    }
    return [str(part) for pair in given.items() for part in pair]


class Reader:
    """A teacher as a run with these flags would have it."""

    def __init__(self, flags: Sequence[str], device: torch.device):
        place = ["--use_cpu", str(device.type == "cpu"), "--report_to", "none"]
        self.job = make.prepare(make.Options("unused"), [*flags, *place])
        self.teacher = make.load(self.job)
        self.needs = Needs(head=frozenset({"answer"}), groups=frozenset(self.job.what.groups))

    def batches(self, samples: int) -> Iterator[dict[str, Any]]:
        for places in make.batches_of(self.job, (0, min(samples, len(self.job.dataset)))):
            batch = self.job.collator([self.job.dataset.read(place) for place in places])
            yield {
                name: value.to(self.job.args.device) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }

    def read(self, batch: dict[str, Any]) -> Pass:
        args = self.job.args
        with torch.no_grad(), computing(args), encode_alone(self.teacher):
            with record(self.teacher, self.needs, impl=args.attention_map_impl) as recorder:
                self.teacher(**batch, use_cache=False)
                return recorder.latest


def run(
    folder: str, device: torch.device, flags: Sequence[str], samples: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each precision; of one that cannot run here, the reason."""
    flags = list(flags) or miniature(Path(folder))
    truth = Reader([*flags, *VARIANTS["float32"]], device)
    config = truth.teacher.config
    for name, own in VARIANTS.items():
        row = {"suite": "dtype", "variant": name, "dtype": "float32" if name == "float32" else "bfloat16"}
        row |= {"teacher": f"{config.num_hidden_layers}x{config.hidden_size}", "vocab": config.vocab_size}
        if name == "float16":
            row["dtype"] = name
        try:
            reader = truth if name == "float32" else Reader([*flags, *own], device)
        except CompoDistillError as error:
            yield {**row, "note": f"not run: {error}"}
            continue
        found = [effect(truth.read(batch), reader.read(batch)) for batch in truth.batches(samples)]
        kl, cosine, same = (torch.cat(parts) for parts in zip(*found, strict=True))
        batch = next(truth.batches(samples))
        size, length = batch["input_ids"].shape
        extra = extra_memory(lambda: reader.read(batch), device)  # noqa: B023
        p20, p50, p80 = compare({name: lambda: reader.read(batch)}, device, seconds)[name]  # noqa: B023
        note = f"KL {kl.mean():.2g} (99th percentile {kl.quantile(0.99):.2g}), "
        note += f"cosine {cosine.mean():.6f} (1st percentile {_least(cosine):.4f}), same token {same.mean():.2%}"
        row |= {"batch": size, "length": length, "rows": len(kl), "note": note}
        row |= {"measured_mib": sum(weights_bytes(reader.teacher)) / 2**20, "extra_mib": extra}
        yield {**row, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def _least(values: torch.Tensor) -> float:
    """The first percentile (torch's own quantile takes no more than 16 million values)."""
    return values.kthvalue(max(1, len(values) // 100)).values.item()
