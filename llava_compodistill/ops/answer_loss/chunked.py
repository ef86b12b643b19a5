"""The autograd function behind ``answer_loss``: chunks of rows, logits made again in the backward pass.

With z the student's logits, p = softmax(z) over the full vocabulary, and p_S, p_T the student's and the teacher's
softmax over the common vocabulary at temperature T:

    d lm / dz = p - onehot(label)
    d kl / dz = T**2 * (p_S - p_T) / T = T * (p_S - p_T)      on the common vocabulary, 0 beyond it

The forward pass keeps three log-sum-exps a row, so that the backward pass needs one exponential per probability.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Columns of the head's gradient multiplied at a time when the product has to be widened before it is added.
_VOCAB_BLOCK = 16384


class AnswerLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, options):
        ctx.save_for_backward(hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias)
        ctx.options = options
        ctx.set_materialize_grads(False)  # an unused term arrives as None and is not computed
        ctx.dtype = _compute_dtype(hidden, weight)
        # The teacher may be loaded narrower (or wider) than the student.
        ctx.teacher_dtype = None if teacher_hidden is None else _compute_dtype(teacher_hidden, teacher_weight)
        temperature, vocab, chunk_rows = options
        with torch.autocast(hidden.device.type, enabled=False):
            student = _Head(hidden, weight, bias, ctx.dtype)
            teacher = None
            if teacher_hidden is not None:
                teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, ctx.teacher_dtype)
            rows = hidden.shape[0]
            lm_sum = torch.zeros((), dtype=student.wide, device=hidden.device)
            kl_sum = torch.zeros_like(lm_sum)
            normalisers = torch.empty(3, rows, dtype=student.wide, device=hidden.device)
            for start in range(0, rows, chunk_rows):
                part = slice(start, min(start + chunk_rows, rows))
                logits = student.logits(part)
                normalisers[0, part] = torch.logsumexp(logits, dim=1)
                lm_sum += (normalisers[0, part] - logits.gather(1, labels[part, None]).squeeze(1)).sum()
                if teacher is None:
                    continue
                targets = teacher.logits(part)[:, :vocab].to(student.wide)
                logits = logits[:, :vocab]
                if temperature != 1.0:
                    logits.div_(temperature)
                    targets = targets.div_(temperature)
                normalisers[1, part] = torch.logsumexp(logits, dim=1)
                normalisers[2, part] = torch.logsumexp(targets, dim=1)
                # sum p_T (log p_T - log p_S) = sum p_T (z_T - z_S) - LSE_T + LSE_S, in the buffers at hand
                difference = logits.neg_().add_(targets)
                probs = targets.sub_(normalisers[2, part, None]).exp_()
                kl_sum += difference.mul_(probs).sum() + (normalisers[1, part] - normalisers[2, part]).sum()
        ctx.normalisers = normalisers
        return lm_sum, kl_sum * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lm, grad_kl):
        hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias = ctx.saved_tensors
        temperature, vocab, chunk_rows = ctx.options
        full, common, target = ctx.normalisers.unsqueeze(-1)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            student = _Head(hidden, weight, bias, ctx.dtype)
            teacher = None
            if teacher_hidden is not None and grad_kl is not None:
                teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, ctx.teacher_dtype)
            grad_lm = student.hidden.new_zeros((), dtype=student.wide) if grad_lm is None else grad_lm
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=student.wide) if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=student.wide) if need_bias else None
            for start in range(0, hidden.shape[0], chunk_rows):
                part = slice(start, min(start + chunk_rows, hidden.shape[0]))
                logits = student.logits(part)
                grad = (logits - full[part]).exp_().mul_(grad_lm)
                grad.scatter_add_(1, labels[part, None], -grad_lm.expand(grad.shape[0], 1))
                if teacher is not None:
                    targets = teacher.logits(part)[:, :vocab].to(student.wide)
                    logits = logits[:, :vocab]
                    if temperature != 1.0:
                        logits.div_(temperature)
                        targets = targets.div_(temperature)
                    probs = logits.sub_(common[part]).exp_()
                    probs -= targets.sub_(target[part]).exp_()
                    grad[:, :vocab].add_(probs.mul_(grad_kl * temperature))
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                grad = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ student.weight
                if grad_weight is not None:
                    _add_weight_gradient(grad_weight, grad, student.hidden[part])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


class _Head:
    """A language-model head and its input in the dtype of the product; ``logits`` are widened."""

    def __init__(self, hidden, weight, bias, dtype):
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def logits(self, part: slice) -> torch.Tensor:
        """[rows of the part, V], a buffer of its own."""
        return F.linear(self.hidden[part], self.weight, self.bias).to(self.wide)


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What the product of a plain head would run in here: autocast's dtype inside autocast."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _add_weight_gradient(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """total[V, D] += grad[rows, V].T @ hidden[rows, D]; narrow products are widened block by block before the sum."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), hidden)
        return
    for start in range(0, total.shape[0], _VOCAB_BLOCK):
        block = slice(start, start + _VOCAB_BLOCK)
        total[block] += grad[:, block].t() @ hidden
