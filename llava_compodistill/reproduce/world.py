"""Where recipes are trained: models, data, scripts, an evaluation. The miniature is one world, a cluster another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .recipes import ADAPTER_STAGES, Recipe

if TYPE_CHECKING:
    from ..analysis.samples import Sample
    from ..eval.engine import Engine


class World(Protocol):
    """What a grid of recipes needs.

    Attributes:
        name: the preset.
        title: what it is, in a report's heading.
        metrics: of `evaluate`, by name, what each is called in a table.
        more: further ones, for studies that name them.
        band: the layers that its recipes align.
        jobs: students trained at once; None for one a core or GPU.
        ahead: further runs that may be begun and wait for a device or for another run's stage.
        curve: at how many points of its main stage `train` evaluates a student; it returns them as `curve`.
    """

    name: str
    title: str
    metrics: dict[str, str]
    more: dict[str, str]
    band: str
    jobs: int | None
    ahead: int
    curve: int

    def settings(self) -> dict[str, Any]:
        """What all its runs depend on, as JSON holds it; runs of other settings are made anew."""

    def models(self, recipe: Recipe) -> dict[str, Any]:
        """What a recipe's runs depend on beside: the models and data behind its names, unless `settings` tells."""

    def steps(self, recipe: Recipe) -> int | None:
        """Optimizer steps of a run, over its stages; None where they cannot be told."""

    def normal(self, recipe: Recipe) -> Recipe:
        """The same training in its shortest words: rows that say this world's defaults aloud are not trained twice."""

    def refusal(self, recipe: Recipe) -> str | None:
        """What a recipe lacks here, or None."""

    def refusal_of_figures(self) -> str | None:
        """What the figures of attention lack here, or None."""

    def prepare(self, recipes: Iterable[Recipe]) -> None:
        """Make the data and models that recipes need, where they are missing.

        Raises:
            DataError: naming everything that is missing and cannot be made.
        """

    def train(
        self, recipe: Recipe, seed: int, folder: Path, threads: int, on_log: Callable[[], None]
    ) -> dict[str, Any]:
        """Train one student in a folder; returns `checkpoint`, `seconds`, `steps`, and with `self.curve` the list
        `curve` of [steps, accuracy on the validation split]."""

    def stop(self) -> None:
        """Begin no further stage: a run has failed, or the user stops the command."""

    def load(self, checkpoint: Path | None) -> Engine:
        """A checkpoint, or the teacher for None, to be asked."""

    def samples(self, kind: str) -> list[Sample]:
        """What the figures of attention look at: vqa, questions; cr, captions with false ones beside them."""

    def evaluate(self, checkpoint: Path | None, teacher: str = "default") -> dict[str, Any]:
        """Figures of a checkpoint, or of the teacher for None; where one of `metrics` is missing, a dash is shown."""


def stage_settings(
    recipe: Recipe, position: int, outputs: list[Path], student: str
) -> tuple[str, dict[str, str], list[str]]:
    """The script of a recipe's stage, and what it is given beside paths and rates (scripts/README.md, "Recipes").

    Args:
        position: of the stage among `recipe.stages`.
        outputs: folders of the stages before it.
        student: the base language model.

    Returns:
        (script, environment, flags).
    """
    stage = recipe.stages[position]
    environment = {"PROJECTOR": recipe.projector, "VAT": str(recipe.vat)}
    flags = ["--method", recipe.method, "--method_options", recipe.options]
    if stage in ADAPTER_STAGES:
        return "dpt.sh", {**environment, "STUDENT": student}, [*flags, "--stage", stage]
    adapter, after_adapter = outputs[0], position == 1
    if stage != "sft":  # dft, or a method's own
        flags += [] if stage == "dft" else ["--stage", stage]
        environment |= {"STUDENT": student if after_adapter else str(outputs[-1]), "DPT": str(adapter)}
        # A whole checkpoint brings its adapter along.
        more = [] if after_adapter else ["--pretrain_mm_mlp_adapter", ""]
        return "dft.sh", environment, [*flags, *more]
    environment |= {"DFT": student if after_adapter else str(outputs[-1])}
    more = ["--pretrain_mm_mlp_adapter", str(adapter / "mm_projector.bin")] if after_adapter else []
    return "sft.sh", environment, [*flags, *more]
