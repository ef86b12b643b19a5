"""Suite head: language-model head, cross-entropy and KL, on all positions and on the answer rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import compare, extra_memory, limit_ms

from llava_compodistill.losses import IGNORE_INDEX
from llava_compodistill.ops.answer_loss import answer_loss


@dataclass(frozen=True)
class Shape:
    positions: int
    answers: int
    student: int
    teacher: int
    vocab: int
    dtype: torch.dtype
    train_head: bool = True

    def columns(self) -> dict[str, Any]:
        return {
            "length": self.positions,
            "rows": self.answers,
            "student": self.student,
            "teacher": self.teacher,
            "vocab": self.vocab,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def limit(self, device: torch.device) -> float:
        """Least ms: logits of the answer rows, the gradient of the hidden states and of a head that is trained. Reads
        the heads, and writes the gradient of one that is trained."""
        weights = self.vocab * self.student
        products = 2 * self.answers * (weights * (3 if self.train_head else 2) + self.vocab * self.teacher)
        size = torch.finfo(self.dtype).bits // 8
        moved = size * (weights * (2 if self.train_head else 1) + self.vocab * self.teacher)
        return limit_ms(products, moved, device, self.dtype)


class Inputs:
    """Hidden states of all positions, both heads, and labels of which ``answers`` are set, spread evenly."""

    def __init__(self, shape: Shape, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.hidden = normal(shape.positions, shape.student).to(shape.dtype).requires_grad_()
        # Logits of unit variance, then times 3: neither flat nor one-hot.
        self.head = (3 * normal(shape.vocab, shape.student) * shape.student**-0.5).to(shape.dtype)
        self.head.requires_grad_(shape.train_head)
        self.teacher_hidden = normal(shape.positions, shape.teacher).to(shape.dtype)
        self.teacher_head = (3 * normal(shape.vocab, shape.teacher) * shape.teacher**-0.5).to(shape.dtype)
        self.rows = torch.arange(shape.answers, device=device) * shape.positions // shape.answers
        self.targets = torch.randint(0, shape.vocab, (shape.answers,), generator=generator, device=device)
        self.labels = torch.full((shape.positions,), IGNORE_INDEX, device=device)
        self.labels[self.rows] = self.targets

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wanted = [part for part in (self.hidden, self.head) if part.requires_grad]
        return loss.detach(), *torch.autograd.grad(loss, wanted)


def all_positions(inputs: Inputs) -> torch.Tensor:
    """The usual way: float32 logits of every position, masked afterwards."""
    student = (inputs.hidden @ inputs.head.t()).float()
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_head.t()).float()
    lm = F.cross_entropy(student, inputs.labels, ignore_index=IGNORE_INDEX, reduction="sum")
    divergence = F.kl_div(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="none", log_target=True
    )
    return lm + (divergence.sum(dim=-1) * (inputs.labels != IGNORE_INDEX)).sum()


def answer_rows(inputs: Inputs) -> torch.Tensor:
    """The same formulas on the answer rows alone, nothing fused."""
    student = (inputs.hidden[inputs.rows] @ inputs.head.t()).float()
    with torch.no_grad():
        teacher = (inputs.teacher_hidden[inputs.rows] @ inputs.teacher_head.t()).float()
    lm = F.cross_entropy(student, inputs.targets, reduction="sum")
    divergence = F.kl_div(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="sum", log_target=True
    )
    return lm + divergence


def ours(inputs: Inputs, chunk_rows: int | None = None) -> torch.Tensor:
    return answer_loss(
        inputs.hidden[inputs.rows],
        inputs.head,
        inputs.targets,
        inputs.teacher_hidden[inputs.rows],
        inputs.teacher_head,
        chunk_rows=chunk_rows,
    ).loss


def liger(inputs: Inputs) -> torch.Tensor:
    """Liger-Kernel's chunked distillation loss on the answer rows: a mean, here times the rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    mean = function(
        inputs.hidden[inputs.rows],
        inputs.head,
        inputs.teacher_hidden[inputs.rows],
        inputs.teacher_head,
        inputs.targets,
    )
    return mean * len(inputs.targets)


def variants() -> dict[str, Callable[[Inputs], torch.Tensor]]:
    found = {"all positions": all_positions, "answer rows": answer_rows, "ours": ours}
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        print(f"liger is left out: {error}")
    else:
        found["liger"] = liger
    return found


def run(shapes: list[Shape], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        errors = parity(shape, device)
        inputs = Inputs(shape, device)
        work = {
            name: lambda function=function, inputs=inputs: inputs.gradients(function(inputs))
            for name, function in variants().items()
            if not errors[name][0]
        }
        times = compare(work, device, seconds)
        for name, (wrong, error) in errors.items():
            row = {"suite": "head", "variant": name, "parity": f"{error:.1e}", **shape.columns()}
            row["note"] = "head trained" if shape.train_head else "head frozen"
            if wrong:
                yield {**row, "parity": f"FAILED {error:.1e}"}
                continue
            p20, p50, p80 = times[name]
            figures = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "limit_ms": shape.limit(device)}
            yield {**row, **figures, "extra_mib": extra_memory(work[name], device)}


def parity(shape: Shape, device: torch.device) -> dict[str, tuple[bool, float]]:
    """Whether loss and gradients are further from the float64 truth than the plain answer rows are in the same dtype,
    and the largest relative error; on 96 rows and a part of the vocabulary."""
    small = Shape(4 * 96, 96, shape.student, shape.teacher, min(shape.vocab, 8192), shape.dtype, shape.train_head)
    inputs, wide = Inputs(small, device), Inputs(small, device)
    for name in ("hidden", "head", "teacher_hidden", "teacher_head"):
        part = getattr(wide, name)
        setattr(wide, name, part.detach().double().requires_grad_(part.requires_grad))
    truth = wide.gradients(_exact(wide))
    tolerance = 2 * max(torch.finfo(shape.dtype).eps, 2e-6)

    def errors(function: Callable[[Inputs], torch.Tensor]) -> list[float]:
        found = inputs.gradients(function(inputs))
        return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)]

    reference = errors(answer_rows)
    result = {}
    for name, function in variants().items():
        if function is ours:  # in several chunks, as at full size
            function = functools.partial(ours, chunk_rows=32)
        mine = errors(function)
        wrong = any(error > usual + tolerance for error, usual in zip(mine, reference, strict=True))
        result[name] = wrong, max(mine)
    return result


def _exact(inputs: Inputs) -> torch.Tensor:
    """Textbook sums in float64."""
    student = inputs.hidden[inputs.rows] @ inputs.head.t()
    teacher = inputs.teacher_hidden[inputs.rows] @ inputs.teacher_head.t()
    log_q, log_p = student - student.logsumexp(-1, keepdim=True), teacher - teacher.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum() - log_q.gather(1, inputs.targets[:, None]).sum()
