"""The output folder of a run, before anything is loaded: one rank takes it, and all begin at the same checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from ..errors import CheckpointError, CompoDistillError, OutputError
from . import lock, resume

logger = logging.getLogger(__name__)

#: In place of a checkpoint: there is nothing to do.
FINISHED = "finished"


@contextlib.contextmanager
def output_folder(args: Any) -> Iterator[str | None]:
    """Hold a run's folder, and give the checkpoint that it goes on from: None at the beginning, FINISHED at the end.

    The first rank locks, cleans and looks for all: a file system that all share may show each another state. With
    `--save_on_each_node` every machine has a folder of its own; they begin at the newest checkpoint that all have.

    Raises:
        CompoDistillError: the first rank's, on all ranks.
    """
    with contextlib.ExitStack() as held:
        start = error = None
        if args.process_index == 0 or args.save_on_each_node:
            try:
                if args.local_process_index == 0:
                    held.enter_context(lock.locked(args.output_dir))
                    lock.remove_unfinished(args.output_dir)
                start = find_start(args, args.made_with)
            except CompoDistillError as problem:
                error = problem
        if args.world_size > 1 and args.save_on_each_node:
            error = _first(error)
            if error is None:
                start = _common_start(start, args)
        elif args.world_size > 1:
            start, error = broadcast_object_list([start, error])
            error = error or _first(_not_shared(args))
        if error is not None:
            raise error
        if start not in (None, FINISHED):
            resume.name_missing_states(start, args)
        yield start


#: Seconds that a file system may take to show one machine what another has written.
SHOWN_AFTER = 10.0


def _first(error: CompoDistillError | None) -> CompoDistillError | None:
    """The first rank's error of those that have one, on all ranks."""
    return next((each for each in gather_object([error]) if each is not None), None)


def _not_shared(args: Any) -> CompoDistillError | None:
    """What is wrong on a machine that does not see the folder of the first rank, which holds its lock."""
    if args.process_index == 0 or args.local_process_index != 0:
        return None
    until = time.monotonic() + SHOWN_AFTER
    while not (Path(args.output_dir) / lock.LOCK_FILE).exists():
        if time.monotonic() > until:
            return OutputError(
                f"--output_dir {args.output_dir} is not the first machine's folder on rank {args.process_index}. Name "
                "one that all machines share, or add --save_on_each_node True: each then saves in its own."
            )
        time.sleep(0.2)
    return None


def _common_start(start: str | None, args: Any) -> str | None:
    """Where all ranks begin: the newest checkpoint that all have.

    Raises:
        CheckpointError: when there is none although some have one; on all ranks.
    """
    found = gather_object([None if start is None else os.path.basename(start)])
    if len(set(found)) == 1:
        return start
    steps = [int(name.rpartition("-")[2]) if name and name.startswith("checkpoint-") else None for name in found]
    folder = None
    if None not in steps:
        folder = os.path.join(args.output_dir, f"checkpoint-{min(steps)}")
        if resume.damage(Path(folder), args.verify_checkpoints) is not None:
            folder = None
    if not all(gather_object([folder is not None])):
        there = ", ".join(f"{name or 'nothing'} on rank {rank}" for rank, name in enumerate(found))
        raise CheckpointError(
            f"--output_dir {args.output_dir}: the machines have no checkpoint in common ({there}). Copy one to all of "
            "them, or remove those that there are."
        )
    problem = None
    if folder != start:  # which has been looked at
        options = args.resume_anyway, args.verify_checkpoints, args.trust_checkpoint
        try:
            resume.accept(folder, args.made_with, *options)
        except CheckpointError as error:
            problem = error
    problem = _first(problem)
    if problem is not None:
        raise problem
    return folder


def find_start(args: Any, made_with: dict[str, Any]) -> str | None:
    """Where a command begins in its output folder, as `output_folder` gives it.

    Args:
        made_with: the settings that earlier ones are compared with; see `resume.describe`.

    Raises:
        CheckpointError: for other settings, and for code in files.
    """
    options = {"verify": args.verify_checkpoints, "trusted": args.trust_checkpoint}
    start = resume.checkpoint_to_resume(args.output_dir, made_with, args.resume_anyway, **options)
    if start is None and resume.is_finished(args.output_dir, made_with):
        logger.info("%s holds the result of this command, trained to its end: nothing is left to do.", args.output_dir)
        return FINISHED
    return start
