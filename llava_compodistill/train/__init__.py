"""Training, one stage a run: read `run.py` first, it is the whole of it from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import CompoDistillTrainer


def main(argv: list[str] | None = None) -> CompoDistillTrainer:
    """See `run.main`. (LLaVA is imported only when it is called.)"""
    from .run import main as run_stage

    return run_stage(argv)
