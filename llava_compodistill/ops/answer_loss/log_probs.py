"""What a head says of the tokens that follow, without the logits of all rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .head import Head, check_labels, check_model, rows_per_chunk, slices


@torch.no_grad()
def answer_log_probs(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """The log-probability of each row's label under the softmax over the head's whole vocabulary, in nats.

    Args:
        hidden: [R, D] last hidden states at the answer rows; R may be 0.
        head_weight: [V, D].
        labels: [R] int64 in [0, V), as for `answer_loss`.
        bias: [V].
        chunk_rows: rows whose logits exist at a time; by default as many as fit a fixed amount of memory.

    Returns:
        [R], float32 (float64 where the inputs are), without a graph. Logits are computed in the inputs' or autocast's
        dtype, the softmax in float32.

    Raises ``ValueError`` or ``TypeError`` with the value received and the values allowed.
    """
    check_model("model", hidden, head_weight, bias)
    check_labels(labels, len(hidden), len(head_weight))
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(head_weight)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    head = Head(hidden, head_weight, bias)
    found = hidden.new_empty(len(hidden), dtype=head.wide)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in slices(len(hidden), chunk_rows):
            log_probs = F.log_softmax(head.logits(part), dim=1, dtype=head.wide)
            found[part] = log_probs.gather(1, labels[part, None])[:, 0]
    return found
