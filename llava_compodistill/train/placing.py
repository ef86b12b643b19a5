"""Where a run's teacher lives: what --teacher_placement says, checked against the run, and said in the log once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import FlagError
from ..methods import Term
from ..pair.float8 import is_float8
from ..pair.placement import QUANTISED, SHARDED, decide, fully_shard, place_teacher, student_bytes

if TYPE_CHECKING:
    from .trainer import CompoDistillTrainer

logger = logging.getLogger(__name__)


def place(trainer: CompoDistillTrainer) -> tuple[str, Any]:
    """Put the teacher where it is to live. All ranks call it, before the first forward.

    Returns:
        The placement, which is never auto, and what has to be kept as long as the teacher.

    Raises:
        FlagError: for a teacher that was loaded for another placement, and a method that this one does not go with.
    """
    objective, args = trainer.objective, trainer.args
    asked = args.teacher_placement
    if getattr(objective.teacher, "is_quantized", False) != (asked in QUANTISED):
        raise FlagError(f"--teacher_placement {asked}: give it to load_teacher(..., placement={asked!r}) as well.")
    float8 = args.teacher_dtype == "float8"
    if is_float8(objective.teacher) != float8:
        flag = f"--teacher_dtype {args.teacher_dtype}"
        raise FlagError(f"{flag}: give it to load_teacher(..., float8={float8}) as well.")
    whole = _needs_whole_layers(objective.terms, args)
    if whole is not None and asked in SHARDED:
        raise FlagError(
            f"--teacher_placement {asked}: {whole}, and its layers have to be whole then: use replicate, offload, "
            "8bit or 4bit."
        )
    placement, reason = asked, ""
    if asked == "auto":
        accelerator = trainer.accelerator
        ranks, plugin = accelerator.num_processes, accelerator.state.deepspeed_plugin
        stage = 3 if trainer.is_fsdp_enabled else 0 if plugin is None else plugin.zero_stage
        sharded = "zero3" if trainer.is_deepspeed_enabled else "fsdp" if fully_shard() is not None else None
        needed = student_bytes(trainer.model, stage, ranks)
        pieces = None if whole is not None or float8 else sharded
        placement, reason = decide(objective.teacher, args.device, needed, ranks, pieces)
        reason = f" (auto: {reason})"
    logger.info("Teacher: %s%s%s.", placement, ", float8" * float8, reason)
    return placement, place_teacher(objective.teacher, placement, args.device)


def _needs_whole_layers(terms: Iterable[Term], args: Any) -> str | None:
    """Why a teacher's layers cannot be in pieces; None where they can."""
    for term in terms:
        if term.switched_needs() is not None:
            return f"gradients of --method {args.method} pass through the teacher"
        if term.blind_needs() is not None:
            # A rank that gathered layers for it would wait for the others for ever.
            return "with --visual_advantage the teacher runs once more on those ranks alone whose batch has an image"
    return None
