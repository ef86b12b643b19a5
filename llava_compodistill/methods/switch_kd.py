"""Switch-KD (arXiv 2604.14629): L_LM + l1 DBiLD(z_T, z_S) + l2 DBiLD(z_T, z_Sw).

    z_T  = L_T(P_T(V_T(image)), text)        the teacher
    z_S  = L_S(P_S(V_S(image)), text)        the student
    z_Sw = L_T(P_T(V_S(image)), text)        the switch: the student's encoder in the teacher's place

P_T and L_T are frozen, and gradients pass through them to V_S; V_S, P_S and L_S are all trained, so that the dft stage
needs `--unfreeze_mm_vision_tower True`. DBiLD (`losses.bild`) stands in L_KL's place, and `--kl_weight` scales both
terms; l1 = l2 = 1 and tau = 3.

The authors' training code is not public. The formulas follow their figure and a third party's restatement of the
paper's equations; that differences of logits are compared, without a factor tau squared, follows the code of BiLD, on
which DBiLD builds. What is not certain:

* the rows. Here those that predict an answer token; both terms are means over them, as L_LM is. A text-only sample has
  nothing to switch, and its rows count as 0 in L_VSD;
* where the knee is looked for. Here among the `k_max` largest logits;
* the bounds of k. Two restatements have at least 4; at most 64 is chosen here;
* stages, rates and batches. Here an ordinary pre-training comes before one distilled stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..losses.bild import Differences, dbild_loss
from ..pair import Pair
from ..record.forward import Needs, Pass
from ..record.head import HeadRows
from .answers import AnswerTerm
from .base import Method, Sums, Term
from .places import check_same_visual_places, refuse_other_counts

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

_ANSWERS = Needs(head=frozenset({"answer"}))


class _DifferencesTerm(Term):
    """A DBiLD from the teacher's answer rows."""

    count = "answer_tokens"

    def __init__(self, weight: float, options: Differences):
        self.weight, self.options = weight, options

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, self.name, "answers", "another method")

    def dbild(self, mine: HeadRows, theirs: HeadRows) -> torch.Tensor:
        """DBiLD(z_T, z), summed over the answer rows, of logits z with gradients."""
        (weight, bias), (teacher_weight, teacher_bias) = mine.weights, theirs.weights
        return dbild_loss(
            mine.hidden,
            weight,
            theirs.hidden,
            teacher_weight,
            self.options,
            student_bias=bias,
            teacher_bias=teacher_bias,
            vocab_size=self.pair.vocab_size,
        )


class AlignTerm(_DifferencesTerm):
    """L_Align: DBiLD(z_T, z_S)."""

    name = "align"

    def needs(self) -> tuple[Needs, Needs]:
        return _ANSWERS, _ANSWERS

    def on_head(self, student: Pass, teacher: Pass) -> torch.Tensor:
        check_same_visual_places(self.pair, student.batch, teacher.batch)
        return self.dbild(student.head["answer"], teacher.head["answer"])[None]

    def __call__(self, student: Pass, teacher: Pass, returned: torch.Tensor) -> Sums:
        (loss,) = returned.unbind()
        return Sums(loss, {self.name: loss.detach()})


class SwitchTerm(_DifferencesTerm):
    """L_VSD: DBiLD(z_T, z_Sw)."""

    name = "switch"

    def prepare(self, pair: Pair) -> None:
        super().prepare(pair)
        if not pair.trains_encoder:
            raise ValueError(
                "--method switch_kd sends the student's visual features through the teacher, which trains nothing if "
                "the student's encoder is frozen: with the teacher's encoder, the switch is the teacher itself. Train "
                "the encoder with --unfreeze_mm_vision_tower True, or leave the switch out with --method_options "
                "'{\"l2\": 0}'."
            )
        mine, theirs = (model.get_vision_tower().hidden_size for model in (pair.student, pair.teacher))
        if mine != theirs:
            raise ValueError(
                f"--method switch_kd: the teacher's adapter reads {theirs} features a patch and the student's encoder "
                f"gives {mine}. Use the teacher's --vision_tower, or leave the switch out with --method_options "
                "'{\"l2\": 0}'."
            )

    def needs(self) -> tuple[Needs, Needs]:
        return Needs(), _ANSWERS

    def switched_needs(self) -> Needs:
        return _ANSWERS

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        if student.switched is None:  # a batch of text alone
            return Sums(None, {self.name: student.batch.labels.new_zeros((), dtype=torch.float32)})
        loss = self.dbild(student.switched.head["answer"], teacher.head["answer"])
        return Sums(loss, {self.name: loss.detach()})


class SwitchKD(Method):
    """Plain pre-training, and one distilled stage in which the encoder is trained, too."""

    name = "switch_kd"
    recipe = ("pt", "dft")
    teacher_stages = ("dft",)
    defaults = {"l1": 1.0, "l2": 1.0, "tau": 3.0, "k_min": 4, "k_max": 64}

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        values = self.options
        for name in ("l1", "l2"):
            if values[name] < 0:
                raise ValueError(f"--method_options {name}: a loss weight cannot be negative, got {values[name]}.")
        if not values["tau"] > 0:
            raise ValueError(f"--method_options tau: must be greater than 0, got {values['tau']}.")
        if not 3 <= values["k_min"] <= values["k_max"]:
            raise ValueError(
                "--method_options k_min, k_max: 3 <= k_min <= k_max must hold (two logits have one difference, whose "
                f"softmax is always 1), got {values['k_min']} and {values['k_max']}."
            )

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        terms: list[Term] = [AnswerTerm(args.lm_weight, distilled=False)]
        if stage == "dft":
            differences = Differences(self.options["tau"], self.options["k_min"], self.options["k_max"])
            kinds = {"l1": AlignTerm, "l2": SwitchTerm}
            weights = {name: self.options[name] * args.kl_weight for name in kinds}
            terms += [kind(weights[name], differences) for name, kind in kinds.items() if weights[name]]
        return terms
