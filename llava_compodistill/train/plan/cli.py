"""`llava-compodistill plan`: memory, micro-batch, time and the launch line of a run, before anything is downloaded."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import PlanError
from ...pair.layers import match_layers, visual_understanding_layers
from . import configs, flops
from .configs import DEFAULT_TOWER, Described
from .launch import launch_line, student_path, teacher_path
from .planner import RECIPES, RESERVE_GIB, RESERVE_SHARE, Machine, Request, plan_stage
from .report import as_json, print_tables
from .setup import BYTES, TEACHER_BYTES, Models


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill plan",
        description="Predict, from config files alone, the memory of each GPU, the largest micro-batch, the hours and "
        "the launch command of each stage. Exit status: 0 if all stages fit, 1 if one does not, 2 for wrong input.",
        epilog="A model or encoder is given as a folder with config.json, the path of a config.json, or a known name: "
        + ", ".join([*configs.LANGUAGE_MODELS, *configs.TOWERS])
        + ".",
    )
    model = parser.add_argument_group("models")
    model.add_argument("--student", required=True, metavar="MODEL", help="the student's language model")
    model.add_argument("--teacher", metavar="MODEL", help="the teacher, a LLaVA checkpoint or a language model")
    model.add_argument(
        "--tower", metavar="MODEL", help=f"vision encoder (default: the teacher's, else {DEFAULT_TOWER})"
    )
    model.add_argument("--projector", choices=("taf", "mlp2x_gelu"), default="taf", help="the student's adapter")
    model.add_argument(
        "--vocab", type=_count, metavar="N", help="embedding rows of both models, instead of the configs'"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=_count, default=8, metavar="N", help="number of GPUs (default: %(default)s)")
    machine.add_argument(
        "--gpu", choices=tuple(flops.GPUS), help=f"sets memory and speed (default: {flops.DEFAULT_GPU}, the paper's)"
    )
    machine.add_argument("--gpu-memory", type=_amount, metavar="GIB", help="memory of each GPU, in GiB")
    machine.add_argument("--gpu-tflops", type=_amount, metavar="N", help="dense 16-bit peak of each GPU, in TFLOP/s")
    machine.add_argument(
        "--mfu", type=_share, default=flops.MFU, metavar="SHARE",
        help="assumed share of the peak speed that training reaches (default: %(default)s)",
    )  # fmt: skip
    machine.add_argument(
        "--calibration", metavar="FILE",
        help="measured speed instead: the file that scripts/benchmark/run.py --suite plan --calibration FILE writes",
    )  # fmt: skip
    machine.add_argument(
        "--reserve", type=_not_negative, metavar="GIB",
        help=f"memory kept free on each GPU (default: {RESERVE_GIB} GiB plus {RESERVE_SHARE:.0%}% of its memory)",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--method", choices=tuple(RECIPES), default="compodistill", help="default: %(default)s")
    run.add_argument("--stage", default="all", help="one stage of the method, or all (default: %(default)s)")
    run.add_argument("--lora", action="store_true", help="LoRA of the language model in dft and sft")
    run.add_argument("--lora-r", type=_count, default=128, metavar="R", help="LoRA rank (default: %(default)s)")
    run.add_argument(
        "--zero", type=int, choices=(0, 2, 3), help="ZeRO stage; 0: DDP without DeepSpeed (default: 2; with one GPU 0)"
    )
    run.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="default: on"
    )
    run.add_argument("--dtype", choices=tuple(BYTES), default="bf16", help="default: %(default)s")
    run.add_argument("--teacher-dtype", choices=tuple(TEACHER_BYTES), default="auto", help="default: %(default)s")
    run.add_argument("--batch", type=_count, metavar="N", help="micro-batch, instead of the largest that fits")
    run.add_argument("--global-batch", type=_count, metavar="N", help="default: 256 in dpt and pt, 128 in dft and sft")
    run.add_argument("--max-length", type=_count, default=2048, metavar="N", help="default: %(default)s")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--samples", type=_count, metavar="N", help="samples of each stage (default: LLaVA's 558,128 and 665,298)"
    )
    data.add_argument("--text-tokens", type=_count, metavar="N", help="mean text tokens per sample, without the image")
    data.add_argument(
        "--answer-tokens", type=_count, metavar="N", help="how many of the text tokens are answer tokens"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill plan`."""
    options = build_parser().parse_args(argv)
    recipe = RECIPES[options.method]
    if options.stage != "all" and options.stage not in recipe:
        raise PlanError(f"--stage {options.stage}: method {options.method} has {', '.join(recipe)}, or all.")
    student = configs.read_language_model(options.student, "--student")
    teacher = None
    if options.method != "sft":
        if options.teacher is None:
            raise PlanError(f"--teacher is missing: method {options.method} distils from one.")
        teacher = configs.read_language_model(options.teacher, "--teacher")
    tower = options.tower or (teacher.tower if teacher is not None else None) or DEFAULT_TOWER
    request = Request(
        models=_models(options, student, teacher, tower),
        machine=_machine(options),
        method=options.method,
        lora_rank=options.lora_r if options.lora else 0,
        dtype=options.dtype,
        teacher_dtype=options.teacher_dtype,
        zero=(2 if options.gpus > 1 else 0) if options.zero is None else options.zero,
        checkpointing=options.gradient_checkpointing,
        max_length=options.max_length,
        global_batch=options.global_batch,
        samples=options.samples,
        text=options.text_tokens,
        answers=options.answer_tokens,
        batch=options.batch,
    )
    names = list(recipe) if options.stage == "all" else [options.stage]
    plans = [plan_stage(request, name) for name in names]
    where = student_path(student), None if teacher is None else teacher_path(teacher), tower
    lines = [launch_line(request, plan, *where) for plan in plans]
    if options.json:
        print(json.dumps(as_json(request, plans, lines), indent=2))
    else:
        print_tables(request, plans, lines)
    return 0 if all(plan.fits for plan in plans) else 1


def _models(options: argparse.Namespace, student: Described, teacher: Described | None, tower: str) -> Models:
    model = configs.with_vocabulary(student.model, options.vocab)
    encoder = configs.read_tower(tower, "--tower")
    if teacher is None:
        return Models(model, encoder, taf=False)
    theirs = configs.with_vocabulary(teacher.model, options.vocab)
    other = None
    if teacher.tower is not None and options.tower is not None and options.tower != teacher.tower:
        if options.projector == "taf":
            raise PlanError(
                f"--tower {options.tower}: TAF fetches the teacher's adapter, which reads {teacher.tower} "
                f"({teacher.source}). Leave the flag out, or use --projector mlp2x_gelu."
            )
        other = configs.read_tower(teacher.tower, "--teacher")
    adapter = configs.adapter(
        teacher.projector or "mlp2x_gelu", (other or encoder).hidden, theirs.hidden, teacher.source
    )
    models = Models(model, encoder, theirs, adapter, other, taf=options.projector == "taf")
    if options.method == "compodistill":
        try:
            match_layers(*(visual_understanding_layers(each.layers) for each in (model, theirs)))
        except ValueError as error:
            raise PlanError(f"--student {model.name}, --teacher {theirs.name}: {error}.") from None
    return models


def _machine(options: argparse.Namespace) -> Machine:
    memory, tflops = flops.GPUS[options.gpu or flops.DEFAULT_GPU]
    memory = options.gpu_memory or memory
    reserve = RESERVE_GIB + RESERVE_SHARE * memory if options.reserve is None else options.reserve
    measured = {} if options.calibration is None else read_calibration(Path(options.calibration))
    return Machine(options.gpus, memory, reserve, options.gpu_tflops or tflops, options.mfu, measured)


def read_calibration(path: Path) -> dict[str, float]:
    """FLOP/s by stage from a calibration file.

    Raises:
        PlanError: naming file and field.
    """
    found: Any = configs.read_json(path).get("flops_per_second")
    if not isinstance(found, dict) or not found:
        raise PlanError(
            f"{path}: the field flops_per_second is missing, or no object of stages and FLOP/s. "
            "scripts/benchmark/run.py --suite plan --calibration FILE writes such a file."
        )
    for stage, rate in found.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise PlanError(f"{path}: flops_per_second.{stage} is {rate!r}, and must be a number above 0.")
    return {stage: float(rate) for stage, rate in found.items()}


def _count(text: str) -> int:
    return int(_checked(text, int, lambda value: value >= 1, "a whole number of 1 or more"))


def _amount(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def _not_negative(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value < math.inf, "a number of 0 or more")


def _share(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _checked(text: str, kind: Any, allowed: Any, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value
