"""Stages of full-size runs, each trained once: recipes that begin alike share what they have in common.

A stage is known by the command that its script would run, without what changes nothing that is learned (where things
lie, how they are logged, how a batch is split over GPUs), and by the sizes of the files it reads. What it starts from
is in that command, in a folder with a key of its own, so a key stands for all that came before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..about import folder
from ..hosts.files import read_object
from ..train.mix import read_sources
from ..train.resume import WITHOUT_EFFECT
from .runner import StageFailed

STAGE_FILE = "stage.json"
#: Further flags that change nothing that is learned; the batch counts as a whole, and the precision is the machine's.
_NOT_LEARNED = WITHOUT_EFFECT | {
    "dataloader_num_workers",
    "deepspeed",
    "disable_tqdm",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logging_steps",
    "output_dir",
    "per_device_train_batch_size",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "tf32",
    "use_cpu",
}
#: Without a teacher every method is the same training, and a teacher that is named is not loaded.
_OF_THE_TEACHER = {"method", "method_options", "teacher_model_path"}


@dataclass(frozen=True)
class Stage:
    """One call of a training script.

    Attributes:
        name: pt, dpt, dft or sft.
        script, environment, flags: the call, without OUTPUT and what devices it runs on.
        command: the training flags that the script makes of it.
        key: another one for whatever trains otherwise.
        output: its folder.
    """

    name: str
    script: str
    environment: Mapping[str, str]
    flags: tuple[str, ...]
    command: Mapping[str, str] = field(repr=False)
    key: str
    output: Path

    @property
    def steps(self) -> int | None:
        """Optimizer steps, about; None where the data cannot be counted."""
        fixed = int(self.command.get("max_steps", -1))
        if fixed > 0:
            return fixed
        samples = count_samples(self.command["data_path"])
        if samples is None:
            return None
        return math.ceil(samples / int(self.command["global_batch"]) * float(self.command["num_train_epochs"]))


def plan(script: str, environment: Mapping[str, str], flags: Sequence[str], root: Path, processes: int) -> Stage:
    """The stage that a script's call is.

    Args:
        root: below it lie the stages, each in a folder of its own.
        processes: that it is trained with; they divide the batch.

    Raises:
        StageFailed: when the script refuses its settings.
    """
    command = _dry_run(script, tuple(sorted(environment.items())), tuple(flags), processes)
    counted = {flag: value for flag, value in command.items() if flag not in _NOT_LEARNED}
    aligned = command.get("attention_stages", "").replace(" ", "").split(",")
    if command["stage"] in ("pt", "sft") and command["stage"] not in aligned:
        # PT with TAF begins with the teacher's adapter.
        begins = {"teacher_model_path"} if (command["stage"], command["mm_projector_type"]) == ("pt", "taf") else set()
        counted = {flag: value for flag, value in counted.items() if flag not in _OF_THE_TEACHER - begins}
    if command["stage"] == "pt":
        # A run that goes on with a killed stage may be another row's, and training compares all its flags.
        flags = (*flags, "--method", "sft", "--method_options", "{}")
        flags += () if begins else ("--teacher_model_path", "")
    facts = {flag: _plain(value, root) for flag, value in counted.items()}
    sizes = {flag: _sizes(flag, value, root) for flag, value in counted.items()}
    text = json.dumps([script, facts, {flag: size for flag, size in sizes.items() if size}], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    # LLaVA's tools tell what a checkpoint is by these words in its folder's name.
    lora = "-lora" if command.get("lora_enable") == "True" else ""
    output = root / f"llava-{command['stage']}-{key}{lora}"
    return Stage(command["stage"], script, dict(environment), tuple(flags), command, key, output)


def train_once(stage: Stage, run: str, train: Callable[[], float]) -> dict[str, Any]:
    """Train a stage unless it is there; another run, or another process, that is training it is waited for.

    Args:
        run: the name of the run that asks, which the stage's record keeps.
        train: trains it into its folder and returns the seconds.

    Returns:
        What `stage.json` in its folder holds: key, run, seconds, steps, command.
    """
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    path = stage.output / STAGE_FILE
    with stage.output.with_name(f".{stage.output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return read_object(path)
        seconds = train()
        record = {
            "key": stage.key,
            "run": run,
            "seconds": round(seconds, 1),
            "steps": _steps_made(stage.output),
            "command": dict(stage.command),
        }
        # To go on from, with three times the model in optimizer states: there is nothing to go on with.
        for left in stage.output.glob("checkpoint-*"):
            shutil.rmtree(left)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return record


@cache
def count_samples(data_path: str) -> int | None:
    """How many samples `--data_path` has, about: its files are searched, not parsed. None where one is missing."""
    total = 0.0
    try:
        for source in read_sources(data_path):
            with open(source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                total += source.weight * sum(1 for _ in re.finditer(rb'"conversations"\s*:', content))
    except (OSError, ValueError):
        return None
    return round(total)


@cache
def _dry_run(
    script: str, environment: tuple[tuple[str, str], ...], flags: tuple[str, ...], processes: int
) -> Mapping[str, str]:
    """The training flags that a script makes of its settings, the last of each; `global_batch` is the product of the
    batch's three. The machine's own are left out: the same on every machine."""
    machine = {
        "DRY_RUN": "1",
        "GPUS": str(processes),
        "HAS_BF16": "0",
        "HAS_TF32": "0",
        "HAS_DEEPSPEED": "0",
        "NPROC": str(processes),
        "LAUNCHER": "python" if processes == 1 else "torchrun",
        "PYTHON": "python",
        "OUTPUT": "OUTPUT",
    }
    given = {"PRECISION": "fp32", "DEEPSPEED_CONFIG": "none"} | dict(environment)
    command = ["bash", str(folder("scripts") / script), *flags]
    done = subprocess.run(command, env={**os.environ, **given, **machine}, capture_output=True, text=True)
    if done.returncode:
        raise StageFailed(f"{script}: {done.stderr.strip()}")
    arguments = done.stdout.removesuffix("\n\n").split("\n")
    arguments = arguments[arguments.index("llava_compodistill.train") + 1 :]
    found: dict[str, str] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.removeprefix("--").partition("=")
            found[name] = value or "True"  # a flag without a value, unless one follows
        else:
            found[name] = argument
    batch, accumulation = (int(found[f]) for f in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    found["global_batch"] = str(batch * accumulation * processes)
    return found


def _plain(value: str, root: Path) -> str:
    """A value that names a stage's folder without what lies above it, and other paths in one way of writing."""
    if value.startswith(f"{root}{os.sep}"):
        return value.removeprefix(f"{root}{os.sep}")
    return os.path.realpath(value) if os.sep in value and os.path.exists(value) else value


def _sizes(flag: str, value: str, root: Path) -> list[Any]:
    """Sizes of the files that a flag names, but of no stage's: its key tells."""
    if value.startswith(str(root)):
        return []
    if flag == "data_path":
        return [[source.weight, _size(source.path)] for source in read_sources(value)]
    if flag in ("model_name_or_path", "teacher_model_path", "vision_tower") and os.path.isdir(value):
        files = sorted(path for path in Path(value).iterdir() if path.suffix in (".safetensors", ".bin"))
        return [[path.name, _size(path)] for path in files]
    return []


def _size(path: str | Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _steps_made(output: Path) -> int:
    return int(json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
