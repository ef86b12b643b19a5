"""The miniature experiment's settings: sizes, steps and rates, one preset a line of use.

Chosen on the validation split; the test split is only reported. All students get the same steps, batch and rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .dataset import WorldConfig
from .language_models import STUDENT, TEACHER, LanguageModelSpec, PretrainSettings
from .tower import TowerSettings


@dataclass(frozen=True)
class Method:
    """One student of the comparison.

    Attributes:
        label: its row in the table.
        color: its curves, the same everywhere; of Okabe and Ito's palette for the colour-blind.
        distilled: three stages with a teacher, or LLaVA's two without.
        flags: what it changes on the scripts' command line.
        environment: what it changes in the scripts' settings.
    """

    label: str
    color: str
    distilled: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def aligned(self) -> bool:
        """Whether its attention is aligned with the teacher's."""
        return self.distilled and self.environment.get("VAT") != "False"


#: Conversation template of the miniature models, which are base models without a chat format of their own.
VERSION = "qwen_qa"

#: Table 2 in small: neither VAT nor TAF, each, and both; the first layers, where this teacher does not read the image;
#: and a control that is to tell whether this image's attention helps.
METHODS = {
    "sft": Method("SFT", "#999999", distilled=False),
    "kd": Method("KD (logits)", "#E69F00", environment={"PROJECTOR": "mlp2x_gelu", "VAT": "False"}),
    "compodistill": Method("CompoDistill", "#0072B2"),
    "vat": Method("KD + VAT", "#56B4E9", environment={"PROJECTOR": "mlp2x_gelu"}),
    "taf": Method("KD + TAF", "#009E73", environment={"VAT": "False"}),
    "early": Method(
        "CompoDistill, first layers",
        "#CC79A7",
        flags=("--student_layers", "early", "--teacher_layers", "early"),
    ),
    "control": Method("CompoDistill, shuffled targets", "#D55E00", flags=("--shuffle_attention_targets", "True")),
}


def label(method: str) -> str:
    """The name of a method, or of the teacher, in tables and pictures."""
    return "Teacher" if method == "teacher" else METHODS[method].label


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run of the miniature experiment."""

    world: WorldConfig = field(default_factory=WorldConfig)
    tower: TowerSettings = field(default_factory=TowerSettings)
    #: The student starts without any: in single validation runs CompoDistill was ahead so, and KD was not.
    student_text: PretrainSettings = field(default_factory=lambda: PretrainSettings(steps=0))
    teacher_text: PretrainSettings = field(default_factory=PretrainSettings)
    student: LanguageModelSpec = STUDENT
    teacher: LanguageModelSpec = TEACHER
    batch: int = 32
    teacher_pretrain_steps: int = 60
    teacher_steps: int = 4000
    teacher_learning_rate: float = 1.5e-3
    #: New layers under the teacher's own, and how many of these are kept (`growth`): 8 layers in all.
    teacher_new_layers: int = 3
    teacher_kept_layers: int = 5
    #: Steps of the grown teacher with the image in sight of its middle band alone, and then of all layers.
    banded_steps: int = 1000
    opened_steps: int = 1500
    banded_learning_rate: float = 1e-3
    opened_learning_rate: float = 1e-3
    pretrain_steps: int = 60
    distil_steps: int = 1200
    supervised_steps: int = 140
    pretrain_learning_rate: float = 1e-3
    #: Of students whose attention is aligned, and of the others; from prototypes (evidence/README.md).
    aligned_learning_rate: float = 4e-3
    learning_rate: float = 2e-3
    supervised_learning_rate: float = 3e-4
    attention_weight: float = 30.0
    #: The layers that L_ADL aligns: the paper's, where this teacher reads the image (`miniature layers`).
    band: str = "intermediate"
    kl_weight: float = 1.0
    max_length: int = 1024
    logging_steps: int = 10
    similarity_captions: int = 400
    methods: tuple[str, ...] = ("sft", "kd", "compodistill")

    @property
    def all_teacher_steps(self) -> int:
        """Optimizer steps of the teacher, over its stages."""
        return self.teacher_pretrain_steps + self.teacher_steps + self.banded_steps + self.opened_steps

    @property
    def student_steps(self) -> int:
        """Optimizer steps of every student, over its stages."""
        return self.pretrain_steps + self.distil_steps + self.supervised_steps


def override(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Change single settings, each written `name=value`.

    Raises:
        ValueError: for a name that is no number or word among the settings, or a value of another type.
    """
    allowed = {item.name: type(getattr(settings, item.name)) for item in fields(settings)}
    allowed = {name: kind for name, kind in allowed.items() if kind in (int, float, str)}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in allowed:
            raise ValueError(f"--set {assignment}: there is no setting {name!r}; there are {', '.join(allowed)}.")
        try:
            changes[name] = allowed[name](value)
        except ValueError:
            raise ValueError(f"--set {assignment}: {value!r} is no {allowed[name].__name__}.") from None
    return replace(settings, **changes)


def preset(name: str) -> Settings:
    """The settings of a preset: default (two CPU cores, minutes), smoke (seconds) or gpu (larger models and data).

    Raises:
        ValueError: for an unknown name.
    """
    if name == "default":
        return Settings()
    if name == "smoke":
        return Settings(
            world=WorldConfig.preset("smoke"),
            tower=TowerSettings(steps=20),
            teacher_text=PretrainSettings(steps=10),
            batch=8,
            logging_steps=1,
            teacher_pretrain_steps=4,
            teacher_steps=8,
            banded_steps=4,
            opened_steps=4,
            pretrain_steps=3,
            distil_steps=6,
            supervised_steps=3,
            similarity_captions=16,
        )
    if name == "gpu":
        return Settings(
            world=WorldConfig.preset("gpu"),
            tower=TowerSettings(hidden_size=192, intermediate_size=768, num_hidden_layers=6, steps=4_000),
            teacher_text=PretrainSettings(steps=1_000, batch_size=128),
            student=replace(STUDENT, hidden_size=256, intermediate_size=1024, num_hidden_layers=8),
            teacher=replace(
                TEACHER,
                hidden_size=512,
                intermediate_size=2048,
                num_hidden_layers=16,
                num_attention_heads=8,
                num_key_value_heads=8,
            ),
            batch=128,
            teacher_steps=6_000,
            teacher_learning_rate=5e-4,
            # Reading begins where the middle band does: layer 7 of 21.
            teacher_new_layers=7,
            teacher_kept_layers=14,
            banded_learning_rate=5e-4,
            opened_learning_rate=1e-4,
            distil_steps=2_400,
            supervised_steps=400,
            aligned_learning_rate=5e-4,
            learning_rate=5e-4,
            supervised_learning_rate=1e-4,
        )
    raise ValueError(f"preset {name!r}: must be default, smoke or gpu.")
