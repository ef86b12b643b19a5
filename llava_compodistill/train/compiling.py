"""What a run makes faster: decoder layers that are compiled (--compile_layers) and Liger's kernels
(--use_liger_kernel). Neither changes what is computed but in rounding."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import compat
from ..errors import FlagError
from ..hosts import host_of
from ..hosts.llava.model import llava_core
from ..record.compiled import compiled_layers, refuse_without_compiler

if TYPE_CHECKING:
    from .arguments import TrainingArguments
    from .trainer import CompoDistillTrainer

logger = logging.getLogger(__name__)

#: Liger's kernels by the names that its functions have for them. Those for cross-entropy are not among them: they put
#: a forward of their own in the model's place, which knows nothing of answer rows.
LIGER_KERNELS = ("rope", "rms_norm", "swiglu")
#: What transformers adds to the batches of an evaluation under --use_liger_kernel, for those other forwards.
SKIP_LOGITS = "skip_logits"


# ---------------------------------------------------------------------------------------------------------------------
# Compiled layers
# ---------------------------------------------------------------------------------------------------------------------
def check_compiled(training: TrainingArguments, here: bool = True) -> None:
    """Refuse layers that cannot be compiled, or not here.

    Raises:
        ValueError: naming the flags and the way out.
    """
    which, why = training.compile_layers, None
    if training.torch_compile:
        raise ValueError(
            "--torch_compile True (or its backend or mode): compiles the whole model, whose passes are recorded while "
            "they run. Use --compile_layers student, teacher or both, which compiles layer by layer."
        )
    if which == "none":
        return
    zero = getattr(training, "hf_deepspeed_config", None) if training.deepspeed else None
    of_student, of_teacher = (which in (model, "both") for model in ("student", "teacher"))
    if compat.UNCOMPILED is not None:
        why = f"needs {compat.UNCOMPILED}: leave the flag out"
    elif of_teacher and not training.distilled:
        why = f"no teacher is in the loss of --stage {training.stage} of {training.method}: use student"
    elif of_teacher and training.teacher_placement not in ("auto", "replicate"):
        why = f"--teacher_placement {training.teacher_placement} moves the teacher's layers: use replicate, or student"
    elif of_student and training.bits in (4, 8):
        why = f"not with the quantised weights of --bits {training.bits}: leave one of them out"
    elif of_student and zero is not None and zero.is_zero3():
        why = "ZeRO-3 gathers the weights of each module in calls that cannot be compiled: use ZeRO-2, or teacher"
    elif of_student and training.fsdp:
        why = "not tried with --fsdp: use DDP or ZeRO-2, or teacher"
    elif of_student and training.image_layers != "all":
        why = f"--image_layers {training.image_layers} gives layers other masks while they run: leave one of them out"
    elif of_student and training.on_policy:
        why = f"with --on_policy {training.on_policy:g} the student generates, token by token: use teacher"
    elif training.padding_free:
        why = "--padding_free and --pack_length give layers other sizes and attention while they run: leave them out"
    elif getattr(training, "use_liger_kernel", False):
        why = "--use_liger_kernel True has kernels of its own in the layers: leave one of them out"
    if why is not None:
        raise ValueError(f"--compile_layers {which}: {why}.")
    if here:
        refuse_without_compiler(f"--compile_layers {which}", training.device)


@contextlib.contextmanager
def compiled(trainer: CompoDistillTrainer) -> Iterator[None]:
    """Inside the context the layers that the run's flag names are compiled; the teacher has been placed."""
    which, said = trainer.args.compile_layers, []
    with contextlib.ExitStack() as stack:
        if which in ("student", "both"):
            said.append(f"{_compile(stack, llava_core(trainer.model))} of the student")
        if which in ("teacher", "both"):
            placement, _ = trainer._placed
            if any(term.switched_needs() is not None for term in trainer.objective.terms):
                raise FlagError(
                    f"--compile_layers {which}: gradients of --method {trainer.args.method} pass through the teacher, "
                    "which is compiled without them: use student."
                )
            if placement == "replicate":
                said.append(f"{_compile(stack, trainer.objective.teacher)} of the teacher")
            else:
                logger.warning("--compile_layers %s: not the teacher's, whose placement is %s.", which, placement)
        if said:
            logger.info("Compiled decoder layers: %s.", " and ".join(said))
        yield


def _compile(stack: contextlib.ExitStack, core: nn.Module) -> int:
    stack.enter_context(compiled_layers(core))
    return len(host_of(core).decoder_layers(core))


# ---------------------------------------------------------------------------------------------------------------------
# Liger's kernels
# ---------------------------------------------------------------------------------------------------------------------
def liger_kernels(training: TrainingArguments) -> dict[str, bool]:
    """Which of LIGER_KERNELS a run uses, by --liger_kernel_config.

    Raises:
        ValueError: for a kernel that there is not here.
    """
    given: dict[str, Any] = training.liger_kernel_config or {}
    for name, value in given.items():
        if name not in LIGER_KERNELS and value:
            raise ValueError(
                f"--liger_kernel_config: {name} is none of {', '.join(LIGER_KERNELS)}. (Cross-entropy is computed "
                "with the head and L_KL, at answer rows alone.)"
            )
    return {name: bool(given.get(name, True)) for name in LIGER_KERNELS}


def check_liger(training: TrainingArguments, here: bool = True) -> None:
    """Refuse --use_liger_kernel where it cannot run, or not here.

    Raises:
        ValueError: naming the flags and the way out.
    """
    if not getattr(training, "use_liger_kernel", False):  # transformers has it since 4.45
        return
    liger_kernels(training)
    why = None
    if training.chosen_method.changes_student(training.stage):
        why = f"--stage {training.stage} of {training.method} makes experts, which it has no kernel for"
    elif here and training.device.type == "cpu":
        why = "its kernels need a GPU"
    elif here:
        try:
            importlib.import_module("liger_kernel.transformers")
        except ImportError as error:
            why = f"needs liger-kernel ({error}): pip install liger-kernel"
    if why is not None:
        raise ValueError(f"--use_liger_kernel True: {why}, or leave the flag out.")


def use_liger(model: nn.Module, teacher: nn.Module | None, training: TrainingArguments) -> None:
    """Put Liger's kernels for rotary embeddings, norms and gated networks into a student and its teacher, where the
    run's flag asks for them. Rotary embeddings are changed for all models of the family in this process.

    (transformers' own way does nothing: Liger knows no model type that begins with `llava_`.)

    Raises:
        FlagError: for a model that Liger has no kernels for.
    """
    if not getattr(training, "use_liger_kernel", False):
        return
    kernels = liger_kernels(training)
    library = importlib.import_module("liger_kernel.transformers")
    for core in (llava_core(model), teacher):
        if core is None:
            continue
        family = core.config.model_type.removeprefix("llava_")
        apply = getattr(library, f"apply_liger_kernel_to_{family}", None)
        if apply is None:
            raise FlagError(
                f"--use_liger_kernel True: this release of liger-kernel has no kernels for {core.config.model_type}. "
                "Leave the flag out."
            )
        apply(**kernels, cross_entropy=False, fused_linear_cross_entropy=False, model=core)
    used = [name for name, value in kernels.items() if value]
    logger.info("Liger's kernels: %s.", ", ".join(used) or "none")
