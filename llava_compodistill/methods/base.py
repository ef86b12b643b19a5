"""A method is a list of terms over recorded passes.

The trainer knows windows of micro-batches, ranks, logging and saving, and no term by name. A term says what it needs
of the student's and of the teacher's pass, and makes a sum of it; the sum is divided by a count over the whole
optimizer step, so that neither accumulation nor the number of ranks changes the loss. README.md here says how to add
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..pair import Pair
from ..record.forward import Needs, Pass
from .schedule import Schedule

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments
    from ..train.calibration import Calibration

#: What a sum can be divided by: fields of `train.facts.BatchFacts`.
COUNTS = ("answer_tokens", "image_samples", "samples", "aligned_spans")


@dataclass
class Sums:
    """What a term makes of one micro-batch.

    Attributes:
        loss: scalar with a graph, a sum over rows or samples; None to measure and not to train.
        logged: by name, sums like the loss but without a graph, logged as means over optimizer steps. The names must
            be the same on every micro-batch: ranks add them up together.
        weights: by name in `logged`, the factor with which it enters the loss where that is not the term's.
        measured: by name, (sum, count) of this micro-batch: logged as sum of sums over sum of counts, and left out
            where nothing was counted.
    """

    loss: torch.Tensor | None
    logged: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Term:
    """One summand of a method's loss.

    Attributes:
        name: unique in its method.
        count: what its sum is divided by, one of COUNTS.
        weight: its factor in the loss.
        schedule: how that changes over the stage; None where it is constant. What is in force is logged.
        module: weights of its own, trained and saved beside the student's, and in no LLaVA checkpoint.
        calibrated_by: the flags that make it look at data before training, with their values; "" where it does not.
        calibration_batches: on how many batches `calibrate` wants both models' passes.
        calibration_samples: on how many samples with an image it wants the sight of a model's layers.
        unlike_tokenizers: whether it runs on a pair with two tokenizers, where text tokens do not correspond; visual
            tokens do, at other positions (`pair.tokens`).
        left_out_by: the flag that takes the term out of its method, where there is one.
        from_cache: whether it can do with what `--teacher_cache` holds of a teacher: `Pass.top` in place of what
            reaches the head at answer rows, and `Pass.maps`.
    """

    name: ClassVar[str]
    count: ClassVar[str] = "samples"
    weight: float = 1.0
    schedule: Schedule | None = None
    module: nn.Module | None = None
    calibrated_by: str = ""
    calibration_batches: int = 0
    calibration_samples: int = 0
    unlike_tokenizers: ClassVar[bool] = False
    left_out_by: ClassVar[str] = ""
    from_cache: ClassVar[bool] = False

    def weight_at(self, progress: float) -> float:
        """Its factor in the loss of an optimizer step.

        Args:
            progress: the share of the stage's steps that are made before this one.
        """
        return self.weight if self.schedule is None else self.weight * self.schedule(progress)

    def on(self, pair: Pair) -> Sequence[Term]:
        """The terms that stand for this one on a pair: itself, as a rule."""
        return [self]

    def prepare(self, pair: Pair) -> None:
        """Look at the pair, once, before training.

        Raises:
            ValueError: when the term cannot run on this pair, with the way out.
        """

    def needs(self) -> tuple[Needs, Needs]:
        """What the student's and the teacher's pass have to leave behind."""
        return Needs(), Needs()

    def switched_needs(self) -> Needs | None:
        """What the teacher's pass on the student's visual features has to leave behind (`Pass.switched`, for
        `__call__`); None where the term needs no such pass, which costs another forward of the teacher and a backward
        through it."""

    def blind_needs(self) -> Needs | None:
        """What the teacher's pass on the text alone, its images left out, has to leave behind (`Pass.blind` of the
        teacher's pass); None where the term needs no such pass, which costs another forward of the teacher on a much
        shorter sequence."""

    def on_head(self, student: Pass, teacher: Pass | None) -> torch.Tensor | None:
        """[K] values that need the head's weights: made inside the student's head, where they are whole under ZeRO-3.

        `__call__` is given them as `returned`.
        """

    def __call__(self, student: Pass, teacher: Pass | None, returned: torch.Tensor | None) -> Sums:
        """The term of one micro-batch.

        Args:
            returned: what `on_head` returned.
        """
        raise NotImplementedError

    def calibrate(self, data: Calibration) -> Any:
        """Look at data before training, in as many rounds as it takes; returns what `use` takes, as JSON can hold it.

        Every checkpoint keeps it, so that a run that goes on has no need to look again: its student has changed.
        """

    def use(self, calibrated: Any) -> None:
        """Take what `calibrate` found: the first rank's on all ranks, or that of the run that is gone on with."""


def prepared(terms: Sequence[Term], pair: Pair) -> list[Term]:
    """The terms as they run on a pair, prepared.

    Raises:
        ValueError: naming the terms that cannot run on it, and what can be done.
    """
    found = [part for term in terms for part in term.on(pair)]
    unfit = [term for term in found if not (pair.shares_tokenizer or term.unlike_tokenizers)]
    if unfit:
        ways = "".join(f" {term.left_out_by} leaves out {term.name}." for term in unfit if term.left_out_by)
        raise ValueError(
            "The teacher's tokenizer is not the student's, and this method has terms that compare tokens of text one "
            f"by one: {', '.join(term.name for term in unfit)}. Use a teacher with the student's tokenizer, such as a "
            f"larger model of its family, or --method kd or compodistill.{ways}"
        )
    for term in found:
        term.prepare(pair)
    return found


class Method:
    """A way to train a student.

    Args:
        options: values of `--method_options`, which replace the defaults.

    Attributes:
        name: what `--method` calls it.
        recipe: its stages, in their order.
        teacher_stages: the stages that load a teacher, whatever the arguments.
        aligns_attention: whether it has L_ADL, which `--attention_stages` and `--attention_schedule` are for.
        on_policy: whether its terms can do with answers that the student has given itself (`--on_policy`), whose
            labels are not to be learned (`Pass.given_rows` tells which are).
        whole_stages: the stages that do not go with LoRA or quantised weights.
        paired_stages: the stages whose data are pairs of answers, see `train.data.PreferenceDataset`.
        defaults: the options and their defaults.
        weighed: what `--visual_advantage` can weigh in it.

    Raises:
        ValueError: for an option that the method does not have, or of another type than its default.
    """

    name: ClassVar[str]
    recipe: ClassVar[Sequence[str]] = ("dpt", "dft", "sft")
    teacher_stages: ClassVar[Sequence[str]] = ()
    aligns_attention: ClassVar[bool] = False
    on_policy: ClassVar[bool] = False
    paired_stages: ClassVar[Sequence[str]] = ()
    whole_stages: ClassVar[Sequence[str]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    weighed: ClassVar[Sequence[str]] = ()

    def __init__(self, options: Mapping[str, Any] | None = None):
        for name, value in (options or {}).items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ValueError(f"--method_options {name}: method {self.name} has the options: {known}.")
            default = self.defaults[name]
            numbers = isinstance(default, float) and type(value) in (int, float)
            if type(value) is not type(default) and not numbers:
                raise ValueError(f"--method_options {name}: {value!r} must be a value like its default, {default!r}.")
        self.options = {**self.defaults, **(options or {})}

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        """The terms of one of the stages: pt, dpt, dft, sft, or another of `recipe`."""
        raise NotImplementedError

    def aligns(self, stage: str, args: TrainingArguments) -> bool:
        """Whether L_ADL is trained in a stage."""
        wanted = args.vat and args.attention_weight > 0 and stage in args.attention_stages.split(",")
        return self.aligns_attention and wanted

    def has_teacher(self, stage: str, args: TrainingArguments) -> bool:
        """Whether a stage loads a teacher."""
        return stage in self.teacher_stages or self.aligns(stage, args)

    def check_student(self, config: Any, stage: str) -> None:
        """Look at the config of the student that a distilled stage starts from, before weights are read.

        Raises:
            ValueError: for a student that the stage cannot start from, with the way out.
        """

    def changes_student(self, stage: str) -> bool:
        """Whether `change_student` does anything in this stage."""
        return False

    def change_student(self, core: nn.Module, stage: str) -> None:
        """Change the student's architecture in place before a stage, on the weights that it starts from."""

    def trained(self, stage: str, name: str) -> bool:
        """Whether a stage beyond the adapter's trains this weight of the language model (by its name in the model)."""
        return True
