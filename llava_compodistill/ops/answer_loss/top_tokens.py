"""A teacher's distributions as their k likeliest tokens and the mass of all others.

With K the k tokens, p_i their probabilities and p_R = 1 - sum_K p_i, the divergence that a student q learns from is
that of k + 1 outcomes,

    KL = sum_K p_i log(p_i / q_i) + p_R log(p_R / q_R),        q_R = sum of the other q_j

which is the divergence from the distribution that has p_i on K and shares p_R among the others as the student does,
t_j = q_j p_R / q_R. So is its gradient, d KL / d z = q - t (held fixed, t is what a whole teacher would give there):
`answer_loss` takes either. With K the whole vocabulary it is the ordinary divergence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .head import Head, check_model, rows_per_chunk, slices

#: The log of a mass of 0, finite: e to it is 0, and 0 times it is 0.
NOTHING = -1e4


class TopTokens(NamedTuple):
    """Of R rows.

    Attributes:
        tokens: [R, k] int64, the likeliest first, no token twice in a row.
        log_probs: [R, k] floating point, in nats.
        rest: [R], the log of the mass of all other tokens of the common vocabulary; `NOTHING` where there is none.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    def at(self, rows: slice | torch.Tensor) -> TopTokens:
        """Some of the rows."""
        return TopTokens(*(part[rows] for part in self))

    def spread(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The distribution t of the module's docstring.

        Args:
            log_probs: [R, V], the student's over the common vocabulary.

        Returns:
            log t [R, V], and log(p_R / q_R) [R], which `block` takes.
        """
        others = log_probs.scatter(1, self.tokens, -torch.inf)
        ratio = self.rest.to(log_probs.dtype) - torch.logsumexp(others, dim=1).clamp(min=NOTHING)
        others.add_(ratio[:, None])
        return others.scatter_(1, self.tokens, self.log_probs.to(log_probs.dtype)), ratio

    def block(self, log_probs: torch.Tensor, start: int, ratio: torch.Tensor) -> torch.Tensor:
        """t itself in the columns of the vocabulary from `start` on.

        Args:
            log_probs: [R, w], the student's there.
            ratio: what `spread` returned.
        """
        found = (log_probs + ratio[:, None]).exp_()
        place = self.tokens - start
        inside = (place >= 0) & (place < log_probs.shape[1])
        place = place.where(inside, log_probs.shape[1])  # a column of its own, which is cut off
        padded = F.pad(found, (0, 1))
        return padded.scatter_(1, place, self.log_probs.to(found.dtype).exp())[:, :-1]


@torch.no_grad()
def top_tokens(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> TopTokens:
    """The k likeliest tokens of each row under softmax(logits[:, :vocab_size] / temperature).

    Args:
        hidden: [R, D] last hidden states at the answer rows; R may be 0.
        head_weight: [V, D].
        k: at least 1; no more than the vocabulary are taken.
        bias: [V].
        temperature: T > 0.
        vocab_size: the common vocabulary, as for `answer_loss`; all of V by default.
        chunk_rows: rows whose logits exist at a time; by default as many as fit a fixed amount of memory.

    Returns:
        `TopTokens`, float32 (float64 where the inputs are). Logits are computed in the inputs' or autocast's dtype.

    Raises ``ValueError`` or ``TypeError`` with the value received and the values allowed.
    """
    check_model("model", hidden, head_weight, bias)
    vocab = len(head_weight) if vocab_size is None else vocab_size
    if not 1 <= vocab <= len(head_weight):
        raise ValueError(f"vocab_size must lie in [1, {len(head_weight)}], the rows that the head has, got {vocab}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    k = min(k, vocab)
    head = Head(hidden, head_weight, bias)
    tokens = torch.empty(len(hidden), k, dtype=torch.long, device=hidden.device)
    log_probs = hidden.new_empty(len(hidden), k, dtype=head.wide)
    rest = hidden.new_empty(len(hidden), dtype=head.wide)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in slices(len(hidden), chunk_rows or rows_per_chunk(head_weight)):
            logits = head.logits(part, slice(vocab)).to(head.wide) / temperature
            found = F.log_softmax(logits, dim=1)
            log_probs[part], tokens[part] = found.topk(k, dim=1)
            others = found.scatter_(1, tokens[part], -torch.inf)
            rest[part] = torch.logsumexp(others, dim=1).clamp(min=NOTHING)
    return TopTokens(tokens, log_probs, rest)


def check_top_tokens(top: TopTokens, rows: int, vocab: int) -> None:
    """Check what `answer_loss` is given.

    Raises:
        TypeError, ValueError: with the value received and the values allowed.
    """
    if top.tokens.dtype != torch.int64 or not top.log_probs.dtype.is_floating_point:
        raise TypeError(
            f"teacher_top must hold int64 tokens and floating point log-probabilities, got {top.tokens.dtype} and "
            f"{top.log_probs.dtype}"
        )
    shapes = [list(part.shape) for part in top]
    if top.tokens.ndim != 2 or shapes != [[rows, top.tokens.shape[1]]] * 2 + [[rows]]:
        raise ValueError(f"teacher_top must be [R, k], [R, k] and [R] with R = {rows}, got {shapes}")
    if top.tokens.shape[1] > vocab:
        raise ValueError(f"teacher_top has {top.tokens.shape[1]} tokens a row, and the common vocabulary {vocab}")
    if top.tokens.device.type == "cpu" and top.tokens.numel():
        low, high = (int(bound) for bound in top.tokens.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(f"tokens of teacher_top must lie in [0, {vocab}), got {low} to {high}")
