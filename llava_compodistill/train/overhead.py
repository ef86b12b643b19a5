"""What the Trainer does anew in every micro-batch although it does not change."""

from __future__ import annotations

from typing import Any


class CountsOnce:
    """A Trainer that walks over all weights once, and not in every micro-batch, to count floating-point operations:
    transformers counts as many for every token, 6 a weight."""

    _each_token: float | None = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        tokens = inputs["input_ids"].numel()
        if self._each_token is None:
            self._each_token = super().floating_point_ops(inputs) / tokens
        return self._each_token * tokens
