"""The command that runs a planned stage: scripts/*.sh with the variables that they read."""

from __future__ import annotations

import shlex
from pathlib import Path

from .configs import DEFAULT_TOWER, Described
from .planner import Request, StagePlan, checkpoint_of

#: The scripts' own defaults, which need not be said.
DEFAULTS = {"TOWER": DEFAULT_TOWER, "LORA": "0", "LORA_R": "128", "MAX_LENGTH": "2048", "PROJECTOR": "taf"}
DEFAULTS |= {"GRADIENT_CHECKPOINTING": "True"}


def student_path(described: Described) -> str:
    """What the scripts take as STUDENT."""
    return _folder(described.source)


def teacher_path(described: Described) -> str:
    """What the scripts take as TEACHER: a LLaVA checkpoint. Of a language model, the one that teacher_finetune.sh
    makes of it."""
    if described.tower is not None:
        return _folder(described.source)
    return checkpoint_of(Path(_folder(described.source)).name)


def launch_line(request: Request, plan: StagePlan, student: str, teacher: str | None, tower: str) -> str:
    """The command of a stage. What is the scripts' default is left out.

    Args:
        student, teacher: as `student_path` and `teacher_path` give them.
    """
    setup, gpus = plan.setup, request.machine.gpus
    captions = plan.name == "pt"
    settings = {"STUDENT": student}
    if teacher is not None:
        settings["TEACHER"] = teacher
    settings["TOWER"] = tower
    if captions:
        settings["ONLY"] = "pretrain"
    settings["PRETRAIN_BATCH" if captions else "BATCH"] = str(setup.batch)
    if plan.global_batch != plan.stage.global_batch:
        settings["PRETRAIN_GLOBAL_BATCH" if captions else "GLOBAL_BATCH"] = str(plan.global_batch)
    if plan.name != "dpt" and not captions:
        settings["LORA"] = str(int(bool(setup.lora_rank)))
        settings["LORA_R"] = str(setup.lora_rank or 128)
    settings["MAX_LENGTH"] = str(request.max_length)
    if request.method != "sft":
        settings["PROJECTOR"] = "taf" if request.models.taf else "mlp2x_gelu"
    settings["GRADIENT_CHECKPOINTING"] = str(setup.checkpointing)
    settings["PRECISION"] = setup.dtype
    settings["NPROC"] = str(gpus)
    settings["LAUNCHER"] = "deepspeed" if setup.zero else "torchrun" if gpus > 1 else "python"
    if setup.zero == 3:
        settings["DEEPSPEED_CONFIG"] = "scripts/zero3.json"
    said = {name: value for name, value in settings.items() if DEFAULTS.get(name) != value}
    words = [f"{name}={shlex.quote(value)}" for name, value in said.items()]
    flags = ["--method", "kd"] if request.method == "kd" and plan.stage.distils else []
    if plan.stage.distils and setup.teacher_dtype != "auto":
        flags += ["--teacher_dtype", setup.teacher_dtype]
    return " ".join([*words, "bash", f"scripts/{plan.stage.script}", *flags])


def _folder(source: str) -> str:
    path = Path(source)
    return str(path.parent) if path.suffix == ".json" else source
