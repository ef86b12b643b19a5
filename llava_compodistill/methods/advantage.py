"""Visual advantage: L_KL and L_ADL weighted by how much the image helps the teacher to predict an answer token.

    a_t = log p_T(y_t | image, text) - log p_T(y_t | text)

VA-OPD (arXiv 2605.21924) finds that few tokens have a large advantage and that these carry what a student can learn
about the image; it weights whole answers of the student by their mean advantage, and averages its divergence over the
tokens of high and of low advantage apart. Here the answers are those of the data, and each token has a weight of its
own (`losses.advantage`), with the mean 1 in each sample, so that neither the loss's scale nor what it is divided by
changes.

p_T(y_t | text) comes from the teacher's forward on the text alone: the sample as it is without its images, its text
closed up and at the positions that this text has. It is what the teacher reads in samples of text. A mask that hides
visual tokens from text in all layers leaves the same keys, but at the distances that they have around the image; it
computes all the visual tokens, and FlashAttention does not take it. (VA-OPD hides "fine-grained visual detail" only.)

Three kinds of tokens have no advantage and the weight 1: those of text-only samples, those whose image
`--model_max_length` has cut off, and one that no text precedes (the first of a caption under the template `plain`
where the tokenizer has no BOS). Answers before a sample's first image have the advantage 0, and so the lowest weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..hosts.base import IGNORE_INDEX, MergedBatch, sent
from ..losses.advantage import advantage_weights
from ..pair import Pair
from ..record.forward import Needs, Pass
from .answers import common_rows
from .base import Sums, Term

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments


class AdvantageTerm(Term):
    """Asks for the teacher's pass on text alone, weighs tokens and rows of other terms, and logs the mean advantage.

    Args:
        args: the floor, and whether weights are shuffled by the seed.
    """

    name = "advantage"
    count = "answer_tokens"

    def __init__(self, args: TrainingArguments):
        self.args = args

    def on(self, pair: Pair) -> Sequence[Term]:
        if not pair.shares_tokenizer:
            raise ValueError(
                f"--visual_advantage {self.args.visual_advantage}: the teacher's tokenizer is not the student's, so "
                "it predicts other tokens than those to be weighed. Use a teacher with the student's tokenizer, such "
                "as a larger model of its family, or leave the flag out."
            )
        return [self]

    def prepare(self, pair: Pair) -> None:
        self.pair = pair

    def needs(self) -> tuple[Needs, Needs]:
        return Needs(), Needs(log_probs=True)

    def blind_needs(self) -> Needs:
        return Needs(log_probs=True)

    def token_weights(self, teacher: Pass) -> torch.Tensor:
        """[R]: the weights of the teacher's answer rows."""
        if teacher.blind is None:  # a batch of text alone
            return torch.ones_like(teacher.log_probs)
        owner, number = _answer_numbers(teacher.batch)
        weights = advantage_weights(_advantages(teacher), self.args.advantage_floor)[owner, number]
        if self.args.shuffle_advantage:
            order = _shuffled(owner, teacher.batch.answer_targets(), self.args.seed)
            weights = weights[order]
        return weights

    def row_weights(self, student: Pass, teacher: Pass) -> torch.Tensor:
        """[B, N]: the weights of the student's queries: those of the answer tokens that they predict, 1 elsewhere."""
        weights, rows = self.token_weights(teacher), student.batch.places("answer")
        found = weights.new_ones(student.batch.labels.shape)
        if self.pair.shares_encoder:  # and one limit: one sequence
            found[rows] = weights
            return found
        mine, theirs = common_rows(student.batch, teacher.batch)
        sample, position = (index[mine] for index in rows)
        found[sample, position] = weights[theirs]
        return found

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        if teacher.blind is None:
            zero = teacher.batch.labels.new_zeros((), dtype=torch.float32)
            return Sums(None, measured={self.name: (zero, zero)})
        advantage = _advantages(teacher)
        return Sums(None, measured={self.name: (advantage.nansum(), (~advantage.isnan()).sum())})


def _answer_numbers(batch: MergedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] each: the sample of an answer row, and which of the sample's answer tokens it predicts, counted from 0."""
    owner, position = batch.places("answer")
    # Nothing predicts a label at the first position, but it is a token of the answer, with or without the image.
    number = (batch.labels != IGNORE_INDEX).long().cumsum(dim=1)[owner, position + 1] - 1
    return owner, number


def _advantages(teacher: Pass) -> torch.Tensor:
    """[B, K] in nats, by sample and number of the answer token; NaN where there is none."""
    blind, batch = teacher.blind, teacher.batch
    tables = []
    for found in (teacher, blind):
        owner, number = _answer_numbers(found.batch)
        if found is blind:  # which holds the samples with an image alone
            owner = sent(batch.on_cpu().has_image.nonzero()[:, 0], owner.device)[owner]
        width = max(batch.labels.shape[1], blind.batch.labels.shape[1])
        table = found.log_probs.new_full((len(batch.labels), width), torch.nan)
        table[owner, number] = found.log_probs
        tables.append(table)
    return tables[0] - tables[1]


def _shuffled(owner: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """[R]: the answer rows, reordered within each sample. The order depends on the seed and the sample's tokens alone,
    and so neither on batches and ranks nor on the state of a generator."""
    order: list[int] = []
    for count in owner.bincount().tolist():
        tokens = targets[len(order) : len(order) + count].tolist()
        generator = torch.Generator().manual_seed(seed + zlib.crc32(repr(tokens).encode()))
        order += (torch.randperm(count, generator=generator) + len(order)).tolist()
    return torch.tensor(order, device=owner.device, dtype=torch.long)
