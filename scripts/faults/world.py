"""What the runs need: the miniature's stored models, its smoke data, and a few lines of them to train on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES = 12
#: The stage of each kind of run, the template, and what differs. PLACE names another kind's output.
RUNS: dict[str, dict[str, Any]] = {
    "dpt": {"stage": "dpt", "version": "plain"},
    "dft": {"stage": "dft", "pretrain_mm_mlp_adapter": "dpt/mm_projector.bin"},
    "dft-lora": {
        "stage": "dft", "pretrain_mm_mlp_adapter": "dpt/mm_projector.bin", "lora_enable": True, "lora_r": 4,
        "lora_dropout": 0.1,
    },
    "sft": {"stage": "sft", "model_name_or_path": "dft"},
}  # fmt: skip
STEPS = 3


@dataclass(frozen=True)
class World:
    """Where everything lies.

    Attributes:
        root: the folder that holds all of it: data, models, eval (the benchmarks' files), and by the kind of run the
            output of one that nothing disturbed.
    """

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "data" / "images"

    @property
    def teacher(self) -> Path:
        return self.root / "models" / "llava-teacher"

    def data(self, stage: str) -> Path:
        return self.root / ("captions.json" if stage == "dpt" else "questions.json")

    def flags(self, kind: str, output: Path, **changes: Any) -> list[str]:
        """The command line of a run: three steps, a checkpoint after each, one is kept."""
        options = dict(RUNS[kind])
        for name in ("pretrain_mm_mlp_adapter", "model_name_or_path"):
            if name in options:
                options[name] = self.root / options[name]
        values = {
            "model_name_or_path": self.root / "models" / "qwen-student",
            "version": "qwen_qa",
            "teacher_model_path": self.teacher,
            "data_path": self.data(options["stage"]),
            "image_folder": self.images,
            "vision_tower": self.root / "models" / "siglip",
            "mm_projector_type": "taf",
            "output_dir": output,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "model_max_length": 512,
            "use_cpu": True,
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
            "blind": "off",
            **options,
            **changes,
        }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def make(root: Path) -> World:
    """Write data, models and benchmarks; half a second. Nothing is trained."""
    from miniature import weights
    from miniature.benchmarks import write_benchmarks
    from miniature.dataset import WorldConfig, write_dataset

    root.mkdir(parents=True, exist_ok=True)
    write_dataset(root / "data", WorldConfig.preset("smoke"), progress=False)
    weights.install(root / "models")
    write_benchmarks(root / "data", root / "eval")
    for name, target in (("pretrain", "captions"), ("instruct_student", "questions")):
        records = json.loads((root / "data" / f"{name}.json").read_text(encoding="utf-8"))
        (root / f"{target}.json").write_text(json.dumps(records[:SAMPLES]), encoding="utf-8")
    return World(root)


def train(flags: list[str]) -> int:
    """`llava-compodistill train` in this process; its exit status."""
    from llava_compodistill.cli import main

    return main(["train", *flags])


def result(output: Path) -> dict[str, Any]:
    """What a finished run has left, to be compared to the last bit: hashes of its weights, of the optimizer's state in
    its last checkpoint, and what it logged."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    files = [*output.glob("*.safetensors"), *output.glob("*.bin"), *output.glob(f"checkpoint-{STEPS}/optimizer.pt")]
    for path in sorted(files):
        if path.name == "training_args.bin":
            continue
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        found[path.name] = _digest(content)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    found["log"] = [entry for entry in state["log_history"] if "loss" in entry]
    return found


def _digest(content: Any) -> str:
    import torch

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()[:32]
