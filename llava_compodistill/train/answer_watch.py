"""Samples that teach nothing: their answers are cut off, or have no counterpart at the teacher. Their loss is a zero
that nobody sees in the mean, so it is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from .facts import BatchFacts

logger = logging.getLogger(__name__)


class AnswerWatch:
    """Announces the first of such samples, and at the end how many there were.

    Args:
        limit: `--model_max_length`.
        shares_tokenizer: whether the teacher, if any, reads the student's tokens; else answers are aligned.
    """

    def __init__(self, limit: int | None, shares_tokenizer: bool):
        self.limit, self.shares_tokenizer = limit, shares_tokenizer
        self._seen = self._cut = 0  # of this process
        self._told_unaligned = False

    def look(self, found: Sequence[BatchFacts], step: int) -> None:
        """Look at the micro-batches of an optimizer step, of this process."""
        cut, samples, spans, tokens = (
            sum(getattr(batch, name) for batch in found)
            for name in ("cut", "samples", "aligned_spans", "answer_tokens")
        )
        if cut and not self._cut:
            logger.warning(
                "--model_max_length %s leaves no answer to learn from in %d of the %d samples of step %d: raise it, "
                "or shorten such samples. The total is logged at the end of training.",
                *(self.limit, cut, samples, step),
            )
        if tokens and not spans and not self.shares_tokenizer and not self._told_unaligned:
            self._told_unaligned = True
            logger.warning(
                "Step %d: no part of the teacher's answers corresponds to the student's. Either --model_max_length %s "
                "has cut them (the teacher's tokens may be more), or they read otherwise under its template "
                "(--teacher_version).",
                *(step, self.limit),
            )
        self._cut += cut
        self._seen += samples

    def report(self, accelerator: Accelerator) -> None:
        """Log the total over all ranks, where samples were cut."""
        totals = torch.tensor([self._cut, self._seen], dtype=torch.float32, device=accelerator.device)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals, "sum")
        cut, seen = (int(total) for total in totals.tolist())
        if cut and accelerator.is_main_process:
            logger.warning(
                "--model_max_length %s left no answer to learn from in %d of the %d samples of this run.",
                *(self.limit, cut, seen),
            )
