"""Run a language model's head where an answer is predicted, and nowhere else.

A LLaVA sequence is mostly image and prompt; with a vocabulary of 150k tokens the logits of all positions are what
fills the card. Here the head's own call is given the hidden states of the answer rows only. It stays the head's
call: DeepSpeed ZeRO-3 gathers its weight there, and DDP finds the loss in the model's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.answer_loss import answer_loss
from .merge import MergeRecorder


@dataclass
class TeacherAnswers:
    """What the teacher knows at its R answer rows.

    Attributes:
        hidden: [R, D_T], the input of the teacher's head.
        targets: [R], the answer tokens predicted there.
        head: the teacher's head.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    head: nn.Module


@contextlib.contextmanager
def _head_forward(model: nn.Module, forward) -> Iterator[None]:
    head = model.get_output_embeddings()
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@contextlib.contextmanager
def collect_teacher_answers(teacher: nn.Module, recorder: MergeRecorder) -> Iterator[list[TeacherAnswers]]:
    """The forward inside the context does not run the head; the list receives its would-be input at answer rows."""
    collected: list[TeacherAnswers] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        batch = recorder.batch
        rows = hidden[batch.answer_mask()]
        collected.append(TeacherAnswers(rows, batch.answer_targets(), teacher.get_output_embeddings()))
        return hidden.new_zeros(hidden.shape[0], 1, 1)

    with _head_forward(teacher, forward):
        yield collected


@contextlib.contextmanager
def answer_loss_head(
    student: nn.Module,
    recorder: MergeRecorder,
    teacher: TeacherAnswers | None = None,
    *,
    lm_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Iterator[None]:
    """The forward inside the context returns, in place of logits, a [1, 1, 3] tensor: over the answer rows the
    weighted sum that gradients come from, and the two sums that it is made of, without graph: the cross-entropy (L_LM)
    and KL(teacher || student) T^2 (L_KL, zero without a teacher).

    Raises:
        ValueError: when teacher and student predict different answer tokens (another tokenizer or length limit).
    """
    head = student.get_output_embeddings()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        batch = recorder.batch
        targets = batch.answer_targets()
        if teacher is not None and not torch.equal(teacher.targets, targets):
            raise ValueError(
                f"Teacher and student predict different answer tokens ({len(teacher.targets)} and {len(targets)} "
                "rows): their tokenizers or --model_max_length differ, or their encoders give other numbers of visual "
                "tokens and only one sequence was truncated."
            )
        weight, bias = dense_head(head, hidden)
        teacher_weight = teacher_bias = None
        if teacher is not None:
            with torch.no_grad():
                teacher_weight, teacher_bias = dense_head(teacher.head, teacher.hidden)
        sums = answer_loss(
            hidden[batch.answer_mask()],
            weight,
            targets,
            None if teacher is None else teacher.hidden,
            teacher_weight,
            student_bias=bias,
            teacher_bias=teacher_bias,
            lm_weight=lm_weight,
            kl_weight=kl_weight,
            temperature=temperature,
            vocab_size=vocab_size,
        )
        return torch.stack(sums).view(1, 1, 3)

    with _head_forward(student, forward):
        yield


def dense_head(head: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [V, D] and bias [V] that a head multiplies ``hidden`` [..., D] with.

    A plain linear layer has them. One that PEFT has wrapped or bitsandbytes has quantised is asked what it makes of
    the unit vectors, with gradients to what it trains. Dropout of LoRA is not applied to a head.
    """
    if type(head) is nn.Linear:
        return head.weight, head.bias
    size = hidden.shape[-1]
    unit = torch.eye(size, dtype=hidden.dtype, device=hidden.device)
    training = head.training
    head.eval()
    try:
        # The class's own forward: the instance's is the one this is called from.
        weight = type(head).forward(head, unit)
        bias = None
        if any(name.split(".")[-1] == "bias" for name, _ in head.named_parameters()):
            bias = type(head).forward(head, torch.zeros_like(unit[:1]))
            weight = weight - bias
    finally:
        head.train(training)
    return weight.t(), None if bias is None else bias[0]
