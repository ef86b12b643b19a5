"""What its answers cost a model, sample by sample: L_LM of single samples, as the trainer computes that of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..hosts.llava.model import llava_core
from ..ops.answer_loss import answer_loss
from .forward import Needs, Pass, record
from .merge import MergedBatch

#: Makes the context that a forward runs in, of a recorder whose `batch` is that of the running forward.
Inside = Callable[[Any], contextlib.AbstractContextManager]


def answer_costs(
    model: nn.Module, inputs: Mapping[str, Any], inside: Inside | None = None
) -> tuple[torch.Tensor, MergedBatch]:
    """One forward of a batch of B samples.

    Args:
        model: a LLaVA model, as it is or wrapped (DDP, DeepSpeed, PEFT): its forward is what is called.
        inputs: what LLaVA's collator gives, on the model's device.

    Returns:
        [B, 2]: the cross-entropy summed over the answer tokens of each sample, in nats, and their number; and where
        the batch's tokens are.
    """

    def on_head(found: Pass) -> torch.Tensor:
        rows = found.head["answer"]
        weight, bias = rows.weights
        owner = found.batch.rows("answer").nonzero()[:, 0]
        sums = []
        for sample in range(len(found.batch.labels)):
            mine = owner == sample
            loss, *_ = answer_loss(rows.hidden[mine], weight, rows.targets[mine], student_bias=bias)
            sums.append(torch.stack([loss.float(), mine.sum()]))
        return torch.stack(sums)

    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(record(llava_core(model), Needs(head=frozenset({"answer"})), on_head=on_head))
        if inside is not None:
            stack.enter_context(inside(recorder))
        model(**{**inputs, "use_cache": False})
        return recorder.latest.returned, recorder.batch
