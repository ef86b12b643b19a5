"""The entry point of every stage: `deepspeed --module llava_compodistill.train --stage dft …`; see scripts/.

Reads top to bottom: arguments, tokenizer, teacher, student, data, trainer, checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import compat
from ..errors import CheckpointError, CompoDistillError, FlagError
from ..hosts import disk
from ..hosts.llava import register
from ..hosts.llava.loader import add_image_tokens, checkpoint_kind, read_tokenizer
from ..hosts.llava.model import llava_core
from ..hosts.llava.pixels import quick
from ..hosts.llava.taf import PROJECTOR_TYPE
from ..hosts.llava.templates import prepare_tokenizer, use_template
from ..pair.student import build_student, compute_dtype
from ..pair.teacher import load_teacher
from . import checkpoint, manifest, resume
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .cache.run import open_cache
from .checks import check_arguments
from .data import make_data_module
from .on_policy import find_end_token, refuse_other_tokenizer
from .output import FINISHED, output_folder
from .packing import limits_of, pack_data
from .preempt import Preempted
from .rehearsal import check_image_layers, rehearse
from .teacher_text import find_teacher_text
from .trainer import CompoDistillTrainer

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> CompoDistillTrainer | None:
    """Run one stage and return its trainer; None where the folder has held the finished result, without checkpoints.

    Args:
        argv: the command line; `sys.argv[1:]` when None.

    Raises:
        CompoDistillError: for what the user can mend; see `errors`.
        Preempted: a signal has stopped the run, and its checkpoint is saved (see `preempt`).
    """
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(args=argv)
        _set_up_logging(args)
        check_arguments(model_args, data_args, args)
    except ValueError as error:
        raise error if isinstance(error, CompoDistillError) else FlagError(str(error)) from None
    args.made_with = resume.describe(model_args, data_args, args)
    with disk.explained(args.output_dir), output_folder(args) as start:
        if start is FINISHED:
            return None
        return run_stage(model_args, data_args, args, start)


def run_stage(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, start: str | None
) -> CompoDistillTrainer:
    """What is between the command line and the result.

    Args:
        start: the checkpoint that the run goes on from, None for the beginning.
    """
    register(train=True)
    transformers.set_seed(args.seed)

    check_image_layers(model_args, args)
    template = use_template(model_args.version)
    tokenizer = load_tokenizer(model_args, args, template)
    if args.on_policy:
        find_end_token(tokenizer)

    teacher_text = shared = None
    if args.distilled:
        teacher_text, shared = find_teacher_text(tokenizer, model_args, args)
        refuse_other_tokenizer(args, teacher_text)
        terms = rehearse(model_args, args, teacher_text)

    teacher = cache = None
    if model_args.teacher_cache:
        texts = tokenizer, teacher_text, shared
        teacher, cache = open_cache(model_args, data_args, args, terms, *texts, dtype=teacher_dtype(args))
    elif args.distilled or fetches_adapter(model_args, args):
        teacher = load_teacher(
            model_args.teacher_model_path,
            model_args.teacher_model_base,
            dtype=teacher_dtype(args),
            device=args.device if args.distilled else "cpu",
            attn_implementation=model_args.attn_implementation,
            vision_tower=model_args.vision_tower,
            placement=loading_placement(args) if args.distilled else "replicate",
            float8=args.teacher_dtype == "float8",
        )
    student = build_student(model_args, args, teacher)
    if not args.distilled:
        teacher = None  # it has given its adapter
    configure(student, tokenizer, model_args, data_args, args)
    data_module = make_data_module(tokenizer, data_args, args.seed_of_data, teacher_text, args.paired, cache)
    if args.pack_length:
        limits = limits_of(student, None if cache is not None else teacher)
        data_module = pack_data(data_module, limits, template, args)
    checkpoint.check_disk_space(student, args)

    texts = {"tokenizer": tokenizer, "teacher_text": teacher_text, "shared_tokens": shared}
    trainer = CompoDistillTrainer(model=student, teacher=teacher, args=args, **texts, **data_module)
    report(trainer)
    trainer.train(resume_from_checkpoint=start)
    trainer.save_state()
    trainer.save_model(args.output_dir)
    if args.should_save:
        manifest.flush(args.output_dir, subfolders=False)
    checkpoint.report_leftovers(args.output_dir)
    return trainer


#: Seconds after which a launcher has ended all ranks because one has failed.
LAUNCHER_NOTICES = 5.0
#: Names a file for the exit status, which torchrun does not pass on; launch.sh reads it.
STATUS_VARIABLE = "COMPODISTILL_STATUS"


def run_process(argv: list[str] | None = None) -> int:
    """Run one stage as a process, on every rank, and return its exit status: 2 after an error that explains itself,
    those of `preempt` after a signal (0 where torchrun has restarts left and a script asks for the status).

    Args:
        argv: the command line; `sys.argv[1:]` when None.
    """
    status = _tell(0)  # torchrun may have started this again: what the last start has told is old
    try:
        main(argv)
    except Preempted as stopped:
        status = _tell(stopped.code)  # at once: the launcher ends ranks that are not as fast as the first
    except KeyboardInterrupt:
        print("llava_compodistill.train: stopped.", file=sys.stderr)
        return _tell(130)
    except CompoDistillError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # Most errors come on all ranks: the launcher ends this one before it repeats what the first has said.
            time.sleep(LAUNCHER_NOTICES)
        place = f" (rank {rank})" if rank else ""
        print(f"llava_compodistill.train: error{place}: {error}", file=sys.stderr)
        return _tell(2)
    end_processes()
    # torchrun would start a run again that was asked to stop; launch.sh has been told.
    is_restarted = STATUS_VARIABLE in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return 0 if is_restarted else status


def _tell(status: int) -> int:
    path = os.environ.get(STATUS_VARIABLE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(f"{status}\n")
    return status


def end_processes() -> None:
    """Part from the other ranks, at the end of a process."""
    if not torch.distributed.is_initialized():
        return
    on_gloo = torch.distributed.get_backend() == "gloo"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if on_gloo:
        time.sleep(0.5)  # its threads are freeing the tensors of the last collectives, and abort an ending process


def fetches_adapter(model_args: ModelArguments, args: TrainingArguments) -> bool:
    """Whether a stage without a teacher in its loss starts from the teacher's adapter: PT under TAF (Table 14)."""
    new = args.stage == "pt" and not model_args.pretrain_mm_mlp_adapter
    return new and model_args.mm_projector_type == PROJECTOR_TYPE and bool(model_args.teacher_model_path)


def load_tokenizer(model_args: ModelArguments, args: TrainingArguments, template: Any) -> Any:
    """The student's tokenizer, padded on the right, with the template's end token."""
    path = model_args.model_name_or_path
    if os.path.isdir(path) and checkpoint_kind(path) == "adapter":
        raise CheckpointError(
            f"--model_name_or_path {path} holds an adapter only: name the language model there, and the adapter with "
            f"--pretrain_mm_mlp_adapter {os.path.join(path, 'mm_projector.bin')}."
        )
    return read_prepared_tokenizer(path, args, template)


def read_prepared_tokenizer(path: str, args: TrainingArguments, template: Any) -> Any:
    """The tokenizer of a folder or hub name, as `load_tokenizer` gives it."""
    tokenizer = read_tokenizer(
        path, cache_dir=args.cache_dir, model_max_length=args.model_max_length, padding_side="right"
    )
    prepare_tokenizer(tokenizer, template)
    return tokenizer


def configure(
    student: torch.nn.Module,
    tokenizer: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> None:
    """Write what LLaVA's evaluation reads into the student's config, and what its data set reads into `data_args`."""
    core = llava_core(student)
    core.config.tokenizer_padding_side = tokenizer.padding_side
    core.config.tokenizer_model_max_length = tokenizer.model_max_length
    core.config.image_aspect_ratio = data_args.image_aspect_ratio
    core.config.mm_projector_lr = args.mm_projector_lr
    core.config.tune_mm_mlp_adapter = args.tune_mm_mlp_adapter
    core.config.freeze_mm_mlp_adapter = args.freeze_mm_mlp_adapter
    core.generation_config.eos_token_id = tokenizer.eos_token_id
    core.generation_config.pad_token_id = tokenizer.pad_token_id
    add_image_tokens(core, tokenizer)
    if args.gradient_checkpointing:
        core.enable_input_require_grads()

    data_args.is_multimodal = True
    data_args.image_processor = quick(core.get_vision_tower().image_processor)
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end


def teacher_dtype(args: TrainingArguments) -> torch.dtype:
    """The precision that the frozen teacher computes in."""
    computes = args.teacher_dtype in ("auto", "float8")
    return compute_dtype(args) if computes else getattr(torch, args.teacher_dtype)


def loading_placement(args: TrainingArguments) -> str:
    """How the teacher is loaded. What auto stands for is not known before the student is there, but on a CPU."""
    auto = args.teacher_placement == "auto"
    return "replicate" if auto and args.device.type == "cpu" else args.teacher_placement


def report(trainer: CompoDistillTrainer) -> None:
    """Say once what is trained and what runs, before the first step."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    core = llava_core(trainer.model)
    logger.info(
        "Stage %s: %.2fM of %.2fM parameters are trained; attention backend %s.",
        trainer.args.stage,
        trained / 1e6,
        total / 1e6,
        compat.attention_implementation(core),
    )
    trainer.add_callback(ReportSaving())


class ReportSaving(transformers.TrainerCallback):
    """Say before the first step how much a kill would cost. Only the started trainer knows its number of steps."""

    def on_train_begin(self, args, state, control, **kwargs):
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        steps = {
            "no": state.max_steps,
            "steps": state.save_steps,
            "epoch": math.ceil(state.max_steps / max(1, state.num_train_epochs)),
        }.get(strategy)
        if steps is None:  # "best" saves when an evaluation says so
            return
        setting = f"--save_steps {args.save_steps:g}" if strategy == "steps" else f"--save_strategy {strategy}"
        if steps < state.max_steps:
            logger.info(
                "A checkpoint every %d of %d steps (%s): a kill loses at most %d steps.",
                *(steps, state.max_steps, setting, steps),
            )
        else:
            logger.info(
                "No checkpoint before the last of %d steps (%s): a kill loses them all.", state.max_steps, setting
            )


def _set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    level = logging.INFO if args.process_index == 0 else logging.ERROR
    logging.getLogger("llava_compodistill").setLevel(level)
