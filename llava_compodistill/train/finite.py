"""What is not finite ends the run, with its name, before anything of it is saved.

Losses are looked at when they are logged, and losses and weights before every save: to look at them in every
micro-batch would make the GPU wait each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import NonFiniteLossError
from .sharding import own_part


def _way_out(args: Any) -> str:
    advice = (
        "fp16 overflows on this model: use --bf16 True, or --fp16 False."
        if args.fp16
        else "Lower --learning_rate, or look at the data of this step."
    )
    return f"{advice} Checkpoints in {args.output_dir} are untouched."


def refuse_broken_losses(values: Mapping[str, float], step: int, args: Any) -> None:
    """Refuse the terms of one optimizer step that are not finite.

    Args:
        values: by term, with the weight that it enters the loss with.

    Raises:
        NonFiniteLossError: naming the terms and the step.
    """
    names = [name for name, value in values.items() if not math.isfinite(value)]
    if names:
        raise NonFiniteLossError(
            f"Step {step}: the loss term{'s' * (len(names) > 1)} {', '.join(names)} became {values[names[0]]}. "
            + _way_out(args)
        )


def refuse_broken_gradient(norm: float | torch.Tensor | None, step: int, args: Any) -> None:
    """Check the gradients' norm where the Trainer has logged it. (With fp16 a step that overflows is skipped, and the
    loss scale lowered: that is no fault.)

    Raises:
        NonFiniteLossError: naming the step.
    """
    if norm is not None and not args.fp16 and not math.isfinite(float(norm)):
        raise NonFiniteLossError(f"Step {step}: the norm of the gradients became {float(norm)}. " + _way_out(args))


def refuse_broken_weights(
    model: nn.Module, over_ranks: Callable[[torch.Tensor], torch.Tensor], step: int, args: Any
) -> None:
    """Check the trained weights, on all ranks (under ZeRO-3 and FSDP each has a part of them).

    Raises:
        NonFiniteLossError: on all ranks, naming the first weights.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        return
    # One number a tensor, read at once.
    finite = torch.stack([_is_finite(parameter).to(args.device) for _, parameter in trained])
    broken = over_ranks((~finite).float())
    places = broken.nonzero().flatten().tolist()
    if places:
        names = [trained[place][0] for place in places]
        raise NonFiniteLossError(
            f"After step {step} {len(names)} of {len(trained)} trained weights are not finite ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}), because a gradient was not finite. " + _way_out(args)
        )


def _is_finite(parameter: torch.Tensor) -> torch.Tensor:
    """Whether all of it is, as a tensor on its device; under ZeRO-3 and FSDP, all of this rank's part."""
    values = own_part(parameter.detach())
    if hasattr(parameter, "ds_tensor"):
        part = parameter.ds_tensor.detach().flatten()
        # The last ranks' parts are padded, with whatever the memory held.
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        values = part[: max(0, min(len(part), parameter.ds_numel - rank * len(part)))]
    return torch.isfinite(values).all()
