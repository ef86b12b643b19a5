"""LLaVA-MoD (arXiv 2408.15881): a sparse student, distilled in steps.

    pt          the adapter: L_LM
    d2d         dense to dense, language model and adapter: L_KL
    d2s         dense to sparse, the feed-forward networks upcycled into experts: L_LM + L_KL + L_balance
    preference  pairs of answers, with the teacher as the reference: L_pref + L_balance of both answers

L_balance is `balance` (0.01) times the sum over the layers with experts of E sum_e m_e c_e, see `hosts.llava.experts`.
In the sparse steps feed-forward networks, experts, routers and the adapter are trained; attention, embeddings, norms
and head are frozen. L_pref is the paired KTO loss, as in the authors' scripts, or DPO, as in the paper's first
abstract.

What is not certain: the paper's global batches. The authors' training code adds L_balance twice in d2s, as the model's
own loss and once more; here it counts once. Their L_KL indexes logits by unshifted labels; here the shift is causal.
Room and balance are those of a sample, as in their batches of one. The means of kto_pair belong to a micro-batch:
there, unlike elsewhere, accumulation changes the loss. A pair of which the length limit has cut an answer is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..hosts.llava.experts import Experts, routers
from ..losses.preference import KINDS, preference_loss
from ..ops.answer_loss import answer_loss
from ..pair import Pair
from ..record.forward import Needs, Pass
from ..record.head import HeadRows
from .answers import AnswerTerm
from .base import Method, Sums, Term

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

SPARSE_STAGES = ("d2s", "preference")


class BalanceTerm(Term):
    """L_balance: that all experts are used. Beside it is logged how many choices found no room."""

    name = "balance"
    count = "samples"
    unlike_tokenizers = True  # it is the student's alone

    def __init__(self, weight: float):
        self.weight = weight

    def needs(self) -> tuple[Needs, Needs]:
        return Needs(routing=True), Needs()

    def __call__(self, student: Pass, teacher: Pass | None, returned: None = None) -> Sums:
        found = list(student.routing.values())
        loss = torch.stack([routing.balance for routing in found]).sum()
        dropped = torch.stack([routing.dropped for routing in found]).detach()
        measured = {"dropped": (dropped.sum(), dropped.new_full((), dropped.numel()))}
        return Sums(loss, {self.name: loss.detach()}, measured=measured)


class PreferenceTerm(Term):
    """L_pref, over a batch whose first half are samples with their chosen answers, the other half the same samples
    with the rejected ones."""

    name = "preference"
    count = "samples"
    unlike_tokenizers = True  # it compares whole answers

    def __init__(self, kind: str, beta: float):
        if kind not in KINDS:
            raise ValueError(f"--method_options preference: must be one of {', '.join(KINDS)}, got {kind!r}.")
        if beta <= 0:
            raise ValueError(f"--method_options beta: must be above 0, got {beta:g}.")
        self.kind, self.beta = kind, beta

    def prepare(self, pair: Pair) -> None:
        models = (pair.student, pair.teacher)
        self._limits = [getattr(model.config, "tokenizer_model_max_length", None) for model in models]

    def needs(self) -> tuple[Needs, Needs]:
        answers = Needs(head=frozenset({"answer"}))
        return answers, answers

    def on_head(self, student: Pass, teacher: Pass) -> torch.Tensor:
        """[B]: log p_S(answer) - log p_T(answer) of each sample."""
        mine = self._likelihoods(student.head["answer"], student)
        with torch.no_grad():
            theirs = self._likelihoods(teacher.head["answer"], teacher)
        return mine - theirs

    def _likelihoods(self, rows: HeadRows, latest: Pass) -> torch.Tensor:
        weight, bias = rows.weights
        counts = latest.batch.counts("answer")
        losses = [
            answer_loss(hidden, weight, targets, student_bias=bias).loss
            for hidden, targets in zip(rows.hidden.split(counts), rows.targets.split(counts), strict=True)
        ]
        return -torch.stack(losses)

    def __call__(self, student: Pass, teacher: Pass, returned: torch.Tensor) -> Sums:
        if len(returned) % 2:
            raise ValueError(
                f"{len(returned)} samples in a batch of pairs: the preference stage's collator makes pairs."
            )
        whole = self._whole(student, teacher)
        chosen, rejected = (part[whole] for part in returned.chunk(2))
        margins = self.beta * (chosen - rejected).detach()
        pairs = margins.new_full((), len(margins))
        measured = {
            "reward_margin": (margins.sum(), pairs),
            "reward_accuracy": ((margins > 0).sum().float(), pairs),
            "pairs_cut": ((~whole).sum().float(), margins.new_full((), len(whole))),
        }
        if not len(margins):
            return Sums(None, {self.name: margins.sum()}, measured=measured)
        # Divided by the samples, of which a pair has two.
        loss = 2 * preference_loss(chosen, rejected, self.kind, self.beta).sum()
        return Sums(loss, {self.name: loss.detach()}, measured=measured)

    def _whole(self, student: Pass, teacher: Pass) -> torch.Tensor:
        """[P] bool: the pairs of which no answer reaches the length limit in either model."""
        whole = torch.ones(len(student.batch.labels), dtype=torch.bool, device=student.batch.labels.device)
        for latest, limit in zip((student, teacher), self._limits, strict=True):
            if limit is not None:
                whole &= latest.batch.real.sum(dim=1) < limit
        chosen, rejected = whole.chunk(2)
        return chosen & rejected


class LLaVAMoD(Method):
    """Dense, then sparse distillation, then preferences."""

    name = "llava_mod"
    recipe = ("pt", "d2d", "d2s", "preference")
    teacher_stages = ("d2d", "d2s", "preference")
    paired_stages = ("preference",)
    whole_stages = ("d2d", "d2s", "preference")
    defaults = {
        "experts": 4,
        "choices": 2,
        "capacity": 1.5,
        "every": 2,
        "balance": 0.01,
        "preference": "kto_pair",
        "beta": 0.1,
    }

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        values = self.options
        for name, least in (("every", 1), ("balance", 0)):
            if values[name] < least:
                raise ValueError(f"--method_options {name}: must be at least {least}, got {values[name]}.")
        try:
            self._experts(1)
        except ValueError as error:
            raise ValueError(f"--method_options experts, choices, capacity: {error}") from None
        PreferenceTerm(values["preference"], values["beta"])

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        balance = self.options["balance"]
        if stage == "preference":
            # The authors add that of the pass over the chosen and that of the pass over the rejected answers.
            return [PreferenceTerm(self.options["preference"], self.options["beta"]), BalanceTerm(2 * balance)]
        lm_weight = 0.0 if stage == "d2d" else args.lm_weight
        answers = AnswerTerm(lm_weight, args.kl_weight, args.kd_temperature)
        return [answers, BalanceTerm(balance)] if stage == "d2s" else [answers]

    def check_student(self, config: Any, stage: str) -> None:
        there = getattr(config, "experts", None)
        if stage == "preference" and there is None:
            raise ValueError(
                "--stage preference trains a sparse student, and this one is dense: give --model_name_or_path the "
                "checkpoint of the d2s stage."
            )
        wanted = asdict(self._experts(config.num_hidden_layers))
        if stage == "d2s" and there is not None and {**there, "layers": tuple(there["layers"])} != wanted:
            raise ValueError(
                f"--method_options: the student's checkpoint has other experts ({there}) than the options ask for "
                f"({wanted}). Give the options that it was made with."
            )

    def _experts(self, depth: int) -> Experts:
        options = self.options
        layers = tuple(range(0, depth, options["every"]))
        return Experts(layers, options["experts"], options["choices"], options["capacity"])

    def changes_student(self, stage: str) -> bool:
        return stage == "d2s"

    def change_student(self, core: nn.Module, stage: str) -> None:
        from ..hosts.llava.language_models import upcycle

        if routers(core):
            return
        settings = self._experts(core.config.num_hidden_layers)
        upcycle(core, settings)
        layers = ", ".join(map(str, settings.layers))
        logger.info("Upcycled: %d experts, %d a token, in the layers %s.", settings.count, settings.choices, layers)

    def trained(self, stage: str, name: str) -> bool:
        return stage not in SPARSE_STAGES or ".mlp." in name
