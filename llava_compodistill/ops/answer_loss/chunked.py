"""The autograd function behind ``answer_loss``: chunks of rows, loss and gradients in one pass.

With z the student's logits, p = softmax(z) over its full vocabulary, and p_S, p_T the student's and the teacher's
softmax over the common vocabulary at temperature T:

    d lm / dz = p - onehot(label)
    d kl / dz = T**2 * (p_S - p_T) / T = T * (p_S - p_T)      on the common vocabulary, 0 beyond it

The latter times the row's weight, where rows have weights.

The gradient of the head is a sum over all rows. Chunks add to it one after the other where it is float32. For a 16-bit
head that would take a float32 copy of it (1.2 GB at V = 151,936 and D = 2,048): there it is made afterwards, a block
of the vocabulary at a time over all rows, from logits computed once more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .head import FLOAT16_SCALE, Head, hand_out, slices, wide_product
from .top_tokens import TopTokens


class Options(NamedTuple):
    lm_weight: float
    kl_weight: float
    temperature: float
    vocab: int
    chunk_rows: int
    train_hidden: bool
    train_weight: bool
    train_bias: bool
    top: TopTokens | None = None


def gradient_scale(options: Options, row_weight: float = 1.0) -> float:
    """What float16 gradients are multiplied by while they are kept: a power of two that keeps them below 2048 at the
    logits, and so leaves a factor of 32 for the sums over the vocabulary that make those of the hidden states.

    An entry of d lm / dz lies in [-1, 1], and one of d kl / dz in [-T, T] times its row's weight.

    Args:
        row_weight: the largest of the rows' weights.
    """
    largest = abs(options.lm_weight) + abs(options.kl_weight) * options.temperature * row_weight
    if not 2 < largest < math.inf:
        return FLOAT16_SCALE
    return 2.0 ** math.floor(math.log2(2 * FLOAT16_SCALE / largest))


class AnswerLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, kl_row_weights, options
    ):
        # The teacher may be loaded narrower (or wider) than the student.
        student = Head(hidden, weight, bias)
        teacher = None if teacher_hidden is None else Head(teacher_hidden, teacher_weight, teacher_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            run = _Run(student, teacher, labels, kl_row_weights, options)
            run.rows()
            if run.by_vocabulary:
                run.columns()
        ctx.gradients = run.grad_hidden, run.grad_weight, run.grad_bias
        ctx.scale = run.scale
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        ctx.mark_non_differentiable(run.lm, run.kl)
        return options.lm_weight * run.lm + options.kl_weight * run.kl, run.lm, run.kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return *hand_out(ctx, "answer_loss", grad_loss), *[None] * 6


class _Run:
    """The passes of one call. Gradients are those of the loss, for hidden states times ``scale``."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        labels: torch.Tensor,
        row_weights: torch.Tensor | None,
        options: Options,
    ):
        self.student, self.teacher, self.labels, self.options = student, teacher, labels, options
        self.row_weights = None if row_weights is None else row_weights.to(student.wide)[:, None]
        self.with_teacher = teacher is not None or options.top is not None
        self.distils = self.with_teacher and options.kl_weight != 0
        # Whether the divergence needs a softmax of its own.
        self.restricts = options.temperature != 1 or options.vocab < len(student.weight)
        self.scale = 1.0
        if student.dtype == torch.float16:
            weighted = row_weights is not None and len(row_weights) > 0
            self.scale = gradient_scale(options, float(row_weights.abs().max()) if weighted else 1.0)
        narrow, one_chunk = student.weight_dtype != student.wide, len(labels) <= options.chunk_rows
        self.by_vocabulary = options.train_weight and narrow and not one_chunk
        zeros = student.weight.new_zeros
        self.grad_hidden = torch.empty_like(student.hidden) if options.train_hidden else None
        self.grad_weight = None
        if options.train_weight and not self.by_vocabulary:
            self.grad_weight = zeros(student.weight.shape, dtype=student.weight_dtype)
        self.grad_bias = zeros(len(student.weight), dtype=student.wide) if options.train_bias else None
        self.lm, self.kl = zeros((), dtype=student.wide), zeros((), dtype=student.wide)
        #: log-sum-exp of each row: the student's, and at temperature T over the common vocabulary both models' (for a
        #: teacher of top tokens instead what `TopTokens.block` needs)
        self.full, self.common, self.target = zeros(3, len(labels), dtype=student.wide).unbind()

    def rows(self) -> None:
        """Loss and all gradients, but a 16-bit head's of several chunks."""
        student, vocab, temperature = self.student, self.options.vocab, self.options.temperature
        for part in slices(len(self.labels), self.options.chunk_rows):
            logits = student.logits(part)
            log_probs = F.log_softmax(logits, dim=1, dtype=student.wide)
            self.lm -= log_probs.gather(1, self.labels[part, None]).sum()
            self.full[part] = logits[:, 0] - log_probs[:, 0]
            mine = targets = None
            if self.with_teacher:
                mine = log_probs
                if self.restricts:
                    mine = _log_softmax(logits[:, :vocab], temperature, student.wide)
                self.common[part] = logits[:, 0].to(student.wide) / temperature - mine[:, 0]
                del logits
                theirs, logits = self._targets(part, mine)
                difference = theirs - mine
                targets = theirs.exp_()
                difference.mul_(targets)
                if self.row_weights is not None:
                    difference.mul_(self.row_weights[part])
                self.kl += difference.sum() * temperature**2
                del difference
            del logits
            if self.grad_hidden is not None or self.grad_weight is not None or self.grad_bias is not None:
                self._gradients(part, self._logit_gradient(part, 0, log_probs, mine, targets))

    def _targets(self, part: slice, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log p_T [rows, vocab], and the teacher's logits (None where there are none)."""
        vocab, temperature, wide = self.options.vocab, self.options.temperature, self.student.wide
        if self.teacher is None:
            theirs, self.target[part] = self.options.top.at(part).spread(mine)
            return theirs, None
        logits = self.teacher.logits(part)
        theirs = _log_softmax(logits[:, :vocab], temperature, wide)
        self.target[part] = logits[:, 0].to(wide) / temperature - theirs[:, 0]
        return theirs, logits

    def _gradients(self, part: slice, grad: torch.Tensor) -> None:
        student = self.student
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(dim=0)
        grad = (grad.mul_(self.scale) if self.scale != 1 else grad).to(student.dtype)
        if self.grad_hidden is not None:
            torch.mm(grad, student.weight, out=self.grad_hidden[part])
        if self.grad_weight is not None:
            self._add_to_weight(grad, student.hidden[part])

    def _add_to_weight(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """grad_weight += grad.T @ hidden / scale."""
        if grad.dtype == self.grad_weight.dtype and self.scale == 1:
            self.grad_weight.addmm_(grad.t(), hidden)
            return
        # Widened a block at a time, so that the product does not need as much memory again.
        for block in slices(len(self.grad_weight), 16384):
            self.grad_weight[block] += wide_product(grad[:, block].t(), hidden).div_(self.scale)

    def columns(self) -> None:
        """The gradient of a 16-bit head: each block of it is one product over all rows, rounded once."""
        student, teacher = self.student, self.teacher
        vocab, temperature = self.options.vocab, self.options.temperature
        self.grad_weight = torch.empty_like(student.weight, dtype=student.weight_dtype)
        every = slice(0, len(self.labels))
        # Half the logits of a chunk of rows: here the whole gradient lives beside them.
        width = self.options.chunk_rows * len(student.weight) // (2 * len(self.labels))
        for block in slices(len(student.weight), max(64, width)):
            logits = student.logits(every, block).to(student.wide)
            log_probs = logits - self.full[:, None]
            mine = targets = None
            if self.distils and block.start < vocab:
                common = slice(block.start, min(block.stop, vocab))
                mine = log_probs
                if self.restricts:
                    mine = logits[:, : common.stop - common.start].div_(temperature).sub_(self.common[:, None])
                if teacher is None:
                    own = log_probs[:, : common.stop - common.start] if mine is log_probs else mine
                    targets = self.options.top.block(own, block.start, self.target)
                else:
                    targets = teacher.logits(every, common).to(student.wide)
                    targets = targets.div_(temperature).sub_(self.target[:, None]).exp_()
            del logits
            grad = self._logit_gradient(every, block.start, log_probs, mine, targets)
            if self.scale == 1:
                self.grad_weight[block] = grad.to(student.dtype).t() @ student.hidden
            else:
                grad = grad.mul_(self.scale).to(student.dtype)
                self.grad_weight[block] = wide_product(grad.t(), student.hidden).div_(self.scale)

    def _logit_gradient(
        self,
        part: slice,
        start: int,
        log_probs: torch.Tensor,
        mine: torch.Tensor | None,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        """d loss / d logits of the rows ``part`` and the vocabulary from ``start`` on, in the memory of ``log_probs``.

        Args:
            log_probs: [rows, columns], the student's log probabilities.
            mine: [rows, w <= columns], those over the common vocabulary at T; ``log_probs`` itself where it is that.
            targets: [rows, w], the teacher's probabilities there.
        """
        lm_weight, kl_weight, temperature = self.options[:3]
        factor = kl_weight * temperature
        distils = self.distils and targets is not None
        difference = mine.exp_().sub_(targets) if distils and mine is not log_probs else None
        weights = self.row_weights[part] if distils and self.row_weights is not None else None
        if weights is not None:
            (targets if difference is None else difference).mul_(weights)
        grad = log_probs.exp_()
        if difference is not None:
            grad.mul_(lm_weight)[:, : targets.shape[1]].add_(difference, alpha=factor)
        elif distils:
            # In float64, as Python adds the factors of unweighted rows.
            both = lm_weight + factor if weights is None else (lm_weight + factor * weights.double()).to(grad.dtype)
            grad.mul_(both).sub_(targets, alpha=factor)
        else:
            grad.mul_(lm_weight)
        labels = self.labels[part, None] - start
        inside = (labels >= 0) & (labels < grad.shape[1])
        return grad.scatter_add_(1, labels.clamp(0, grad.shape[1] - 1), inside.to(grad.dtype).mul_(-lm_weight))


def _log_softmax(logits: torch.Tensor, temperature: float, wide: torch.dtype) -> torch.Tensor:
    if temperature != 1:
        logits = logits.to(wide) / temperature
    return F.log_softmax(logits, dim=1, dtype=wide)
