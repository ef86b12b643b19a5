"""Runs the project's own training scripts on the miniature world: the same files that train full-size models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_compodistill.reproduce.runner import run_script

from .growth import grow
from .settings import METHODS, VERSION, Settings


def common_flags(settings: Settings, seed: int) -> list[str]:
    return [
        *("--seed", str(seed)),
        *("--data_seed", str(seed)),
        *("--disable_tqdm", "True"),
        *("--save_strategy", "no"),
        *("--group_by_modality_length", "False"),
        *("--image_aspect_ratio", "square"),
        *("--adam_beta2", "0.98"),
    ]


def common_environment(settings: Settings) -> dict[str, object]:
    return {
        "BATCH": settings.batch,
        "GLOBAL_BATCH": settings.batch,
        "PRETRAIN_BATCH": settings.batch,
        "PRETRAIN_GLOBAL_BATCH": settings.batch,
        "MAX_LENGTH": settings.max_length,
        "GRADIENT_CHECKPOINTING": "False",
        "WORKERS": 0,
        "VERSION": VERSION,
        "LOGGING_STEPS": settings.logging_steps,
    }


def train_teacher(
    settings: Settings,
    root: Path,
    threads: int,
    on_log: Callable[[], None] = lambda: None,
    llm: Path | None = None,
    output: Path | None = None,
    seed: int = 0,
) -> Path:
    """Train the teacher, or another one from `llm` in `output`, with teacher_pretrain.sh and teacher_finetune.sh:
    a shallow one first, which is then grown (`growth`)."""
    models, data = root / "models", root / "data"
    output, llm = output or models / "llava-teacher", llm or models / "qwen-teacher"
    environment = {
        **common_environment(settings),
        "TEACHER_LLM": llm,
        "TOWER": models / "siglip",
    }
    flags = common_flags(settings, seed)
    captions = {"DATA": data / "pretrain.json", "IMAGES": data / "images"}
    instruct = {"DATA": data / "instruct_teacher.json", "IMAGES": data / "images"}

    def script(name: str, folder: Path, changes: Mapping[str, object], steps: int, *more: str) -> Path:
        log = root / "logs" / f"{folder.name}.log"
        shutil.rmtree(folder, ignore_errors=True)  # a result there would be recognised as finished
        given = {**environment, **changes, "OUTPUT": folder}
        run_script(name, given, [*flags, "--max_steps", str(steps), *more], log, threads, on_log)
        return folder

    def stage(end: str) -> Path:
        return output.with_name(f"{output.name}-{end}")

    adapter = {**captions, "LR": settings.pretrain_learning_rate}
    pretrained = script("teacher_pretrain.sh", stage("pretrain"), adapter, settings.teacher_pretrain_steps)
    shallow = {**instruct, "PRETRAINED": pretrained, "LR": settings.teacher_learning_rate}
    trained = script("teacher_finetune.sh", stage("shallow"), shallow, settings.teacher_steps)
    grown = grow(trained, stage("grown"), settings.teacher_new_layers, settings.teacher_kept_layers, seed)
    banded = {**instruct, "PRETRAINED": "none", "TEACHER_LLM": grown, "LR": settings.banded_learning_rate}
    read = ("--image_layers", "intermediate")
    trained = script("teacher_finetune.sh", stage("banded"), banded, settings.banded_steps, *read)
    opened = {**banded, "TEACHER_LLM": trained, "LR": settings.opened_learning_rate}
    return script("teacher_finetune.sh", output, opened, settings.opened_steps)


def train_student(
    method: str, seed: int, settings: Settings, root: Path, threads: int, on_log: Callable[[], None] = lambda: None
) -> dict[str, object]:
    """Train one student through its stages; returns where its checkpoint lies, its seconds and its logged steps."""
    chosen = METHODS[method]
    run = root / "students" / f"{method}-seed{seed}"
    models, data = root / "models", root / "data"
    environment: dict[str, object] = {
        **common_environment(settings),
        "STUDENT": models / "qwen-student",
        "TEACHER": models / "llava-teacher",
        "TOWER": models / "siglip",
        **chosen.environment,
    }
    rate = settings.aligned_learning_rate if chosen.aligned else settings.learning_rate
    instruct = {"DATA": data / "instruct_student.json", "IMAGES": data / "images"}
    captions = {"DATA": data / "pretrain.json", "IMAGES": data / "images"}
    flags = common_flags(settings, seed)

    def steps(number: int) -> list[str]:
        return ["--max_steps", str(number)]

    def script(name: str, stage: str, changes: Mapping[str, object], more: list[str]) -> float:
        return run_script(
            name,
            {**environment, **changes},
            [*flags, *more],
            root / "logs" / f"{run.name}-{stage}.log",
            threads,
            on_log,
        )

    seconds = 0.0
    dpt, dft, final = run / "pretrain", run / "dft", run / "llava-student"
    for folder in (dpt, dft, final):
        shutil.rmtree(folder, ignore_errors=True)  # a result there would be recognised as finished
    if chosen.distilled:
        weight = ["--kl_weight", str(settings.kl_weight)]
        seconds += script(
            "dpt.sh",
            "dpt",
            {**captions, "OUTPUT": dpt, "LR": settings.pretrain_learning_rate},
            [*steps(settings.pretrain_steps), *weight],
        )
        seconds += script(
            "dft.sh",
            "dft",
            {**instruct, "DPT": dpt, "OUTPUT": dft, "LR": rate},
            [
                *steps(settings.distil_steps),
                *weight,
                *("--attention_weight", str(settings.attention_weight)),
                *("--student_layers", settings.band, "--teacher_layers", settings.band),
                *("--measure_attention", "True"),
                *chosen.flags,
            ],
        )
        seconds += script(
            "sft.sh",
            "sft",
            {**instruct, "DFT": dft, "OUTPUT": final, "LR": settings.supervised_learning_rate},
            steps(settings.supervised_steps),
        )
        stages = {"dpt": dpt, "dft": dft, "sft": final}
    else:
        # baseline_sft.sh runs both of its steps with the flags it is given; the pre-training is run first, by itself,
        # so that each can have its own number of steps.
        pretrain = {
            "PRETRAIN_DATA": data / "pretrain.json",
            "PRETRAIN_IMAGES": data / "images",
            "PRETRAINED": dpt,
            "PRETRAIN_LR": settings.pretrain_learning_rate,
            **instruct,
            "OUTPUT": final,
        }
        seconds += script("baseline_sft.sh", "pt", {**pretrain, "ONLY": "pretrain"}, steps(settings.pretrain_steps))
        seconds += script(
            "baseline_sft.sh",
            "sft",
            {**pretrain, "LR": rate},
            steps(settings.distil_steps + settings.supervised_steps),
        )
        stages = {"pt": dpt, "sft": final}
    return {
        "checkpoint": str(final),
        "seconds": seconds,
        "steps": settings.student_steps,
        "history": {stage: _history(path) for stage, path in stages.items()},
    }


def _history(output: Path) -> list[dict[str, float]]:
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]
