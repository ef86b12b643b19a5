"""How a student is trained, as data: the row of a table, apart from where and on what it is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

#: Stages that train the adapter alone; the others train the language model, too.
ADAPTER_STAGES = ("pt", "dpt")


@dataclass(frozen=True)
class Recipe:
    """One student.

    Attributes:
        stages: of pt, dpt, dft, sft and the method's own, in their order.
        method: as `--method`.
        options: as `--method_options`.
        projector: `taf` for the teacher's adapter, else LLaVA's own type.
        vat: whether DFT aligns attention.
        flags: more flags of the dft stage.
        teacher, student: names that a world gives models to.
        data: the share of the instruction data.
        mix: which instruction data: "" for a world's own, `scaled` for these with those of Table 9, `doubled` for
            Table 5's, of which half is what the other tables train on, where a world has twice as much.
        rate: learning rate of the stage that does the work (DFT where there is one); None for the world's own.
        weight: factor of the weight of the loss that distils: of L_ADL with `vat`, else of L_KL; None for 1.
        steps: optimizer steps of all stages together, as a share of the world's own.
        cache: options of `llava-compodistill cache`, separated by spaces: the student is trained from a cache of the
            teacher that is made with them. Empty for the teacher itself.
    """

    stages: tuple[str, ...] = ("dpt", "dft", "sft")
    method: str = "compodistill"
    options: str = "{}"
    projector: str = "taf"
    vat: bool = True
    flags: tuple[str, ...] = ()
    teacher: str = "default"
    student: str = "default"
    data: float = 1.0
    mix: str = ""
    rate: float | None = None
    weight: float | None = None
    steps: float = 1.0
    cache: str = ""

    def __post_init__(self) -> None:
        first, *others = self.stages
        if first not in ADAPTER_STAGES or any(stage in ADAPTER_STAGES for stage in others):
            raise ValueError(f"stages {self.stages}: one that trains the adapter, then others.")

    def described(self) -> dict[str, Any]:
        """As JSON holds it; without what came later and is not used, so that earlier runs keep their names."""
        values = asdict(self)
        for name in ("mix", "rate", "weight", "steps", "cache"):
            if values[name] == getattr(Recipe, name):
                del values[name]
        return json.loads(json.dumps(values))

    @property
    def distils(self) -> bool:
        """Whether a loss of it has a weight that can be tuned."""
        return any(stage not in ("pt", "sft") for stage in self.stages)

    @property
    def key(self) -> str:
        """A short name that is another for every other recipe."""
        text = json.dumps(self.described(), sort_keys=True)
        return f"{self.method}-{'-'.join(self.stages)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


SFT = Recipe(stages=("pt", "sft"), method="sft", projector="mlp2x_gelu")
KD = Recipe(method="kd", projector="mlp2x_gelu", vat=False)
COMPODISTILL = Recipe()
