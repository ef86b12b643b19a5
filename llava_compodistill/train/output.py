"""The output folder of a run, before anything is loaded: one rank takes it, and all begin at the same checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from accelerate.utils import broadcast_object_list

from ..errors import CompoDistillError
from . import lock, resume

logger = logging.getLogger(__name__)

#: In place of a checkpoint: there is nothing to do.
FINISHED = "finished"


@contextlib.contextmanager
def output_folder(args: Any) -> Iterator[str | None]:
    """Hold a run's folder, and give the checkpoint that it goes on from: None at the beginning, FINISHED at the end.

    The first rank locks, cleans and looks for all: a file system that all share may show each another state. With
    `--save_on_each_node` every rank looks at its own.

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
                start = _find_start(args)
            except CompoDistillError as problem:
                error = problem
        if args.world_size > 1 and not args.save_on_each_node:
            start, error = broadcast_object_list([start, error])
        if error is not None:
            raise error
        if start not in (None, FINISHED):
            resume.name_missing_states(start, args)
        yield start


def _find_start(args: Any) -> str | None:
    options = {"verify": args.verify_checkpoints, "trusted": args.trust_checkpoint}
    start = resume.checkpoint_to_resume(args.output_dir, args.made_with, args.resume_anyway, **options)
    if start is None and resume.is_finished(args.output_dir, args.made_with):
        logger.info("%s holds the result of this command, trained to its end: nothing is left to do.", args.output_dir)
        return FINISHED
    return start
