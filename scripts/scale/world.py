"""What the runs need: the miniature's stored models and a few of its samples; and which stages follow which."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES = 8
STEPS = 3
#: The step whose checkpoint a run is resumed from.
MIDDLE = 1
ADAPTER, MODEL = "pretrain_mm_mlp_adapter", "model_name_or_path"
LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}


@dataclass(frozen=True)
class Link:
    """A stage that begins where another has ended.

    Attributes:
        after: the name of the run before it; None for the first.
        kind: full, lora, or adapter for the stages that train it alone.
    """

    stage: str
    kind: str
    after: str | None = None

    @property
    def name(self) -> str:
        first = f"{self.stage}" if self.kind == "adapter" else f"{self.stage}-{self.kind}"
        return first if self.after is None else f"{first}-after-{self.after.split('-')[0]}"


def links(kinds: tuple[str, ...] = ("full", "lora")) -> list[Link]:
    """All of them, each after the one that it needs: PT, DPT, and every later stage from every earlier one."""
    chain = [Link("pt", "adapter"), Link("dpt", "adapter")]
    for kind in kinds:
        dft = Link("dft", kind, "dpt")
        chain += [dft, Link("dft", kind, "pt"), Link("sft", kind, "pt"), Link("sft", kind, "dpt")]
        chain += [Link("sft", kind, dft.name)]
    return chain


@dataclass(frozen=True)
class World:
    """Where everything lies: data, models, and by their names the runs."""

    root: Path

    def flags(self, link: Link, runs: Path, output: Path, **changes: Any) -> list[str]:
        """The command line of a run, four samples a step; a change to None drops the flag.

        Args:
            runs: the folder of the runs before.
        """
        captions = link.kind == "adapter"
        before: dict[str, Any] = {}
        if link.after is not None:
            folder = runs / link.after
            from_adapter = (folder / "mm_projector.bin").exists()
            before = {ADAPTER: folder / "mm_projector.bin"} if from_adapter else {MODEL: folder}
        taf = link.stage == "dpt" or (link.after is not None and not link.after.startswith("pt"))
        values: dict[str, Any] = {
            "stage": link.stage,
            MODEL: self.root / "models" / "qwen-student",
            "teacher_model_path": self.root / "models" / "llava-teacher" if link.stage in ("dpt", "dft") else None,
            "version": "plain" if captions else "qwen_qa",
            "data_path": self.root / ("captions.json" if captions else "questions.json"),
            "image_folder": self.root / "data" / "images",
            "vision_tower": self.root / "models" / "siglip",
            "mm_projector_type": "taf" if taf else "mlp2x_gelu",
            "output_dir": output,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            # Adam, whose state has to survive a restart, but with an epsilon above the rounding of gradients: it would
            # otherwise move weights that have none.
            "adam_epsilon": 1e-2,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "model_max_length": 512,
            "use_cpu": True,
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
            "sight_steps": 2,  # a measurement of sight, which every way of wrapping the student has to bear
            "sight_samples": 4,
            **(LORA if link.kind == "lora" else {}),
            **before,
            **changes,
        }
        return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def make(root: Path) -> World:
    """Write models and data; half a second. Nothing is trained."""
    from miniature import weights
    from miniature.dataset import WorldConfig, write_dataset

    root.mkdir(parents=True, exist_ok=True)
    write_dataset(root / "data", WorldConfig.preset("smoke"), progress=False)
    weights.install(root / "models")
    for name, target in (("pretrain", "captions"), ("instruct_student", "questions")):
        records = json.loads((root / "data" / f"{name}.json").read_text(encoding="utf-8"))
        (root / f"{target}.json").write_text(json.dumps(records[:SAMPLES]), encoding="utf-8")
    return World(root)
