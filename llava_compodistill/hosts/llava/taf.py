"""TAF, teacher adapter fetch: the student sees through the teacher's frozen adapter (paper, Section 4.2).

V_S = MLP_S(P_T(E(image))), with P_T: D_v -> D_T the teacher's trained adapter, frozen in every stage, and
MLP_S: D_T -> D_S the only new weights. The adapter lives under LLaVA's name `mm_projector`, so that LLaVA's saving,
learning-rate group and loading apply to it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

PROJECTOR_TYPE = "taf"


class TAFProjector(nn.Module):
    """The teacher's adapter, frozen, followed by the student's map.

    Args:
        teacher_adapter: P_T, any LLaVA projector from D_v to D_T.
        teacher_hidden_size: D_T.
        hidden_size: D_S.
        depth: linear layers of MLP_S: 1 (the paper's "3-layer MLP" with a two-layer P_T), or 2 with a GELU between.
    """

    def __init__(self, teacher_adapter: nn.Module, teacher_hidden_size: int, hidden_size: int, depth: int = 1):
        super().__init__()
        if depth not in (1, 2):
            raise ValueError(f"TAF depth {depth}: MLP_S has 1 or 2 linear layers.")
        self.teacher_adapter = teacher_adapter.requires_grad_(False)
        layers: list[nn.Module] = [nn.Linear(teacher_hidden_size, hidden_size)]
        if depth == 2:
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.student_map = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, from_teacher: bool = False) -> torch.Tensor:
        """Project visual features to the student's width.

        Args:
            features: [..., N_v, D_v] from the vision encoder, or, with `from_teacher`, [..., N_v, D_T] that have been
                through the teacher's adapter already (the encoder and P_T run once a batch for both models).

        Returns:
            [..., N_v, D_S].
        """
        if not from_teacher:
            features = self._fetched(features)
        return self.student_map(features.to(self.student_map[0].weight.dtype))

    def _fetched(self, features: torch.Tensor) -> torch.Tensor:
        """P_T of the features: with gradients to the features of an encoder that is trained, never to P_T itself."""
        # Whatever `requires_grad` says: LLaVA's own code unfreezes all of `mm_projector`.
        if features.requires_grad:
            return self.teacher_adapter.requires_grad_(False)(features)
        with torch.no_grad():
            return self.teacher_adapter(features)


def taf_config(teacher_config: Any, depth: int = 1) -> dict[str, Any]:
    """The config entries from which a student checkpoint rebuilds its adapter without the teacher."""
    projector_type = getattr(teacher_config, "mm_projector_type", "linear")
    if projector_type == PROJECTOR_TYPE:
        raise ValueError("The teacher's own adapter is a TAF adapter: chains of TAF adapters are not supported.")
    return {
        "mm_projector_type": PROJECTOR_TYPE,
        "taf_teacher_projector_type": projector_type,
        "taf_teacher_hidden_size": teacher_config.hidden_size,
        "taf_depth": depth,
    }


def build_taf_projector(config: Any, build_projector: Callable[..., nn.Module]) -> TAFProjector:
    """Build the adapter that a student's config describes, with fresh weights.

    Args:
        config: holds `mm_hidden_size` (D_v), `hidden_size` (D_S) and the entries of `taf_config`.
        build_projector: LLaVA's `build_vision_projector`, which builds P_T.

    Raises:
        ValueError: naming the entry that the config lacks.
    """
    for name in ("taf_teacher_projector_type", "taf_teacher_hidden_size"):
        if getattr(config, name, None) is None:
            raise ValueError(
                f"mm_projector_type is 'taf' but the config has no `{name}`: give --teacher_model_path, or start from "
                "a checkpoint that was made with TAF."
            )
    teacher_side = SimpleNamespace(
        mm_projector_type=config.taf_teacher_projector_type,
        mm_hidden_size=config.mm_hidden_size,
        hidden_size=config.taf_teacher_hidden_size,
    )
    return TAFProjector(
        build_projector(teacher_side),
        config.taf_teacher_hidden_size,
        config.hidden_size,
        getattr(config, "taf_depth", 1),
    )


def fetch_teacher_adapter(student_projector: TAFProjector, teacher_projector: nn.Module) -> None:
    """Copy P_T from the teacher into the student, bit for bit, in the teacher's precision."""
    state = teacher_projector.state_dict()
    student_projector.teacher_adapter.load_state_dict(state)
    dtype = next(iter(state.values())).dtype
    student_projector.teacher_adapter.to(dtype)
    student_projector.teacher_adapter.load_state_dict(state)
    student_projector.teacher_adapter.requires_grad_(False)
