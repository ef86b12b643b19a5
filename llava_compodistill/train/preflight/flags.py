"""A training command line, read on a machine that need not be the one that trains."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from ...errors import DataError
from .. import resume
from ..arguments import DataArguments, ModelArguments, TrainingArguments
from ..checks import check_arguments
from .findings import NOTE, STOPS, Findings

#: Flags that transformers refuses, or acts upon, where there is no GPU: they are read here and set afterwards.
OF_THE_MACHINE = ("bf16", "deepspeed", "fp16", "fsdp", "fsdp_config", "tf32")
#: What stands before the flags when the command of a script is pasted.
MODULE = "llava_compodistill.train"


@dataclass
class Parsed:
    """A command's flags.

    Attributes:
        has_model, has_output: whether a student, and an output folder, are named at all.
        flags: as they were given, without what stood before them.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    has_model: bool
    has_output: bool
    flags: list[str]


def without_launcher(arguments: list[str]) -> list[str]:
    """The flags alone of a pasted command line (`deepspeed … --module llava_compodistill.train --stage …`).

    Raises:
        DataError: for several commands in one line.
    """
    if arguments.count(MODULE) > 1:
        raise DataError(
            "That is more than one training command (a script of several steps?): check them one by one, such as with "
            "ONLY=finetune for baseline_sft.sh."
        )
    if MODULE in arguments:
        return arguments[arguments.index(MODULE) + 1 :]
    if arguments[:2] == ["llava-compodistill", "train"]:
        return arguments[2:]
    return arguments


def parse(flags: list[str], findings: Findings) -> Parsed | None:
    """Read and check the flags as training does; None where they cannot be read."""
    given = {_name(flag) for flag in flags if flag.startswith("--")}
    on_gpu = torch.cuda.is_available()
    rest, held = (flags, {}) if on_gpu else take_out(flags, OF_THE_MACHINE)
    has_output = "output_dir" in given
    if not has_output:
        rest = [*rest, "--output_dir", os.devnull]
    try:
        parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
        model, data, training = parser.parse_args_into_dataclasses(args=rest)
        parsed = Parsed(model, data, training, "model_name_or_path" in given, has_output, flags)
        _set(training, held)
        if parsed.has_model:
            check_arguments(model, data, training, here=False)
    except ValueError as error:  # as the dataclasses say it
        findings.add(STOPS, f"the flags: {error}", remedy="see the message")
        return None
    if held:
        named = ", ".join(f"--{name}" for name in held)
        findings.add(NOTE, f"flags for a GPU, of which there is none here: {named}", remedy="looked at when training")
    if parsed.has_model and data.data_path:
        with findings.stopping("--data_path"):
            training.made_with = resume.describe(model, data, training)
    return parsed


def take_out(flags: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Flags without some of them, and the values of those."""
    rest: list[str] = []
    taken: dict[str, str] = {}
    place = 0
    while place < len(flags):
        flag, equals, value = flags[place].partition("=")
        name = _name(flag)
        place += 1
        if name not in names or not flag.startswith("--"):
            rest.append(flags[place - 1])
            continue
        if not equals:
            has_value = place < len(flags) and not flags[place].startswith("--")
            value = flags[place] if has_value else "True"
            place += has_value
        taken[name] = value
    return rest, taken


def _name(flag: str) -> str:
    """Of `--output_dir=…`: output_dir. Current transformers take dashes for underscores."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_")


def _set(training: TrainingArguments, held: dict[str, str]) -> None:
    for name in ("bf16", "fp16"):
        if name in held:
            setattr(training, name, held[name].lower() in ("true", "1", "yes", "t", "y"))
    if "deepspeed" in held:
        training.deepspeed = held["deepspeed"]
        zero3 = _is_zero3(held["deepspeed"])
        training.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: zero3)


def _is_zero3(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
    except (OSError, ValueError):  # a missing file is a finding of its own
        return False
    return isinstance(content, dict) and (content.get("zero_optimization") or {}).get("stage") == 3
