"""LLaVA-KD (arXiv 2410.16236): L_LM + alpha L_res + beta L_vis + gamma L_rel in DPT and DFT.

L_res is L_KL at the answer rows. L_vis is the same divergence at the visual tokens. L_rel compares the relations of
the visual tokens: 1 - cos(vec(Y_S Y_Sᵀ), vec(Y_T Y_Tᵀ)) with Y the logits of a sample's visual tokens.

The paper's order is DPT, SFT, DFT; DPT trains the adapter alone. What is not certain: gamma is 0.5 in a published
summary of the paper (the default here) and 1 in the training code that is public; that Y are raw logits is an answer
of the authors in their tracker. Their code takes the mean over tokens, as here, where the paper writes sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..losses.relation import head_gram, relation_loss
from ..ops.answer_loss import answer_loss
from ..pair import Pair
from ..record.forward import Needs, Pass
from .answers import AnswerTerm
from .base import Method, Sums, Term
from .places import check_same_visual_places, refuse_other_counts, samples_of

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class _AtVisualTokens(Term):
    """A term on what reaches the heads at the visual tokens."""

    count = "image_samples"

    def __init__(self, weight: float):
        self.weight = weight

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, self.name, "logits", "another method")

    def needs(self) -> tuple[Needs, Needs]:
        visual = Needs(head=frozenset({"visual"}))
        return visual, visual

    def on_head(self, student: Pass, teacher: Pass) -> torch.Tensor:
        check_same_visual_places(self.pair, student.batch, teacher.batch)
        return self.total(student, teacher)[None]

    def total(self, student: Pass, teacher: Pass) -> torch.Tensor:
        """The sum over the samples with an image."""
        raise NotImplementedError

    def __call__(self, student: Pass, teacher: Pass, returned: torch.Tensor) -> Sums:
        (loss,) = returned.unbind()
        return Sums(loss, {self.name: loss.detach()})


class VisualTokensTerm(_AtVisualTokens):
    """L_vis: KL(p_T || p_S) of the next-token distributions at the visual tokens, the mean over a sample's."""

    name = "visual_kl"
    left_out_by = "--method_options '{\"beta\": 0}'"

    def total(self, student: Pass, teacher: Pass) -> torch.Tensor:
        mine, theirs = student.head["visual"], teacher.head["visual"]
        (weight, bias), (teacher_weight, teacher_bias) = mine.weights, theirs.weights
        total = mine.hidden.new_zeros((), dtype=torch.float32)
        for rows in samples_of(student.batch):
            target = torch.zeros(len(rows), dtype=torch.long, device=rows.device)  # no label is asked for: lm_weight 0
            divergence = answer_loss(
                mine.hidden[rows],
                weight,
                target,
                theirs.hidden[rows],
                teacher_weight.detach(),
                student_bias=bias,
                teacher_bias=teacher_bias,
                lm_weight=0.0,
                vocab_size=self.pair.vocab_size,
            )
            total = total + divergence.loss / len(rows)
        return total


class RelationTerm(_AtVisualTokens):
    """L_rel: the distance between the relations of a sample's visual tokens in both models."""

    name = "relation"
    unlike_tokenizers = True  # the relations of visual tokens, whatever the logits are of

    def prepare(self, pair: Pair) -> None:
        super().prepare(pair)
        self._teacher_gram: torch.Tensor | None = None  # the teacher is frozen: made once

    def total(self, student: Pass, teacher: Pass) -> torch.Tensor:
        mine, theirs = student.head["visual"], teacher.head["visual"]
        total = mine.hidden.new_zeros((), dtype=torch.float32)
        if not len(mine.hidden):
            return total
        vocab, teacher_vocab = self.pair.vocab_sizes
        gram = head_gram(*mine.weights, vocab)
        if self._teacher_gram is None:
            with torch.no_grad():
                self._teacher_gram = head_gram(*theirs.weights, teacher_vocab)
        for rows in samples_of(student.batch):
            total = total + relation_loss(mine.hidden[rows], gram, theirs.hidden[rows], self._teacher_gram)
        return total


class LLaVAKD(Method):
    """Response, visual and relation distillation."""

    name = "llava_kd"
    recipe = ("dpt", "sft", "dft")
    teacher_stages = ("dpt", "dft")
    defaults = {"alpha": 1.0, "beta": 1.0, "gamma": 0.5}

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        answers = AnswerTerm(args.lm_weight, self.options["alpha"] * args.kl_weight, args.kd_temperature)
        if stage not in self.teacher_stages:
            return [answers]
        visual = [VisualTokensTerm(self.options["beta"])] if self.options["beta"] else []
        return [answers, *visual, RelationTerm(self.options["gamma"])]
