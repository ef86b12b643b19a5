"""Align-KD (arXiv 2412.01282): L_LM + L_KL + L_attn + L_V, cross-modal alignment where it begins, in the first layer.

L_attn: the mean squared error between the first layers' attention of text queries to visual keys, head by head; a
trained map (a 1 x 1 convolution over heads) brings the teacher's heads to the student's number. L_V: the mean squared
error between the visual tokens that the adapters make, the teacher's brought to the student's width by a trained map,
once over all of them and once over the k that the teacher's first layer attends to most. All weights are 1, k is 16.

What is not certain: the authors' figure names the reverse divergence for the outputs, their public code computes the
forward one, as here. In that code the block of text queries and visual keys is transposed, which leaves the attention
term without a gradient, and the trained maps are not given to the optimizer: here the block is the paper's, and the
maps are trained. Their code trains the language model in pre-training, too; here DPT trains the adapter, as for all
methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..hosts.base import sent
from ..pair import Pair
from ..record.attention import refuse_windows
from ..record.forward import EMBEDDINGS, Needs, Pass
from .answers import AnswerTerm
from .base import Method, Sums, Term
from .places import check_same_visual_places, refuse_other_counts, samples_of

if TYPE_CHECKING:
    from ..train.arguments import TrainingArguments

_LAYER = 0


def _all_heads(model: nn.Module) -> tuple[int, tuple[int, ...]]:
    return _LAYER, tuple(range(model.config.num_attention_heads))


class FirstLayerAttentionTerm(Term):
    """L_attn: mean over heads, text queries and visual keys of a sample of (C(A_T) - A_S)^2."""

    name = "first_attention"
    count = "image_samples"

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, "L_attn", "attention maps", "another method")
        for model in (pair.student, pair.teacher):
            refuse_windows(model, [_LAYER], pair.longest)
        self.module = nn.Conv2d(pair.teacher.config.num_attention_heads, pair.student.config.num_attention_heads, 1)

    def needs(self) -> tuple[Needs, Needs]:
        student, teacher = (frozenset({_all_heads(model)}) for model in (self.pair.student, self.pair.teacher))
        return Needs(heads=student, graph=True), Needs(heads=teacher)

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        batch = student.batch
        check_same_visual_places(self.pair, batch, teacher.batch)
        if not student.head_maps:  # no image in this micro-batch
            return Sums(None, {self.name: batch.labels.new_zeros((), dtype=torch.float32)})
        mine = student.head_maps[_all_heads(self.pair.student)]
        theirs = teacher.head_maps[_all_heads(self.pair.teacher)]
        mapped = self.module(theirs.to(self.module.weight.dtype))
        # Rows that see no visual token hold zeros in both maps, and padding holds anything.
        cells = batch.attention_rows("text")[:, :, None] & (batch.visual_index >= 0)[:, None, :]
        squared = (mapped.float() - mine.float()).square().mean(dim=1).masked_fill(~cells, 0.0)
        loss = (squared.sum(dim=(1, 2)) / cells.sum(dim=(1, 2)).clamp(min=1)).sum()
        return Sums(loss, {self.name: loss.detach()})


class VisualFeatureTerm(Term):
    """L_V: mean squared error of the visual tokens, over all and over those that the teacher attends to most."""

    name = "visual_features"
    count = "image_samples"
    unlike_tokenizers = True

    def __init__(self, top: int):
        if top < 1:
            raise ValueError(f"--method_options k: must be at least 1, got {top}.")
        self.top = top

    def prepare(self, pair: Pair) -> None:
        self.pair = pair
        refuse_other_counts(pair, "L_V", "visual tokens", "another method")
        self.module = nn.Linear(pair.teacher.config.hidden_size, pair.student.config.hidden_size)

    def needs(self) -> tuple[Needs, Needs]:
        tokens = frozenset({(EMBEDDINGS, "visual")})
        return Needs(hidden=tokens), Needs(hidden=tokens, groups=frozenset({(_LAYER,)}))

    def __call__(self, student: Pass, teacher: Pass, returned: None = None) -> Sums:
        check_same_visual_places(self.pair, student.batch, teacher.batch)
        mine, theirs = student.hidden[EMBEDDINGS, "visual"], teacher.hidden[EMBEDDINGS, "visual"]
        if not len(mine):
            return Sums(None, {self.name: mine.new_zeros((), dtype=torch.float32)})
        mapped = self.module(theirs.to(self.module.weight.dtype))
        squared = (mapped.float() - mine.float()).square().mean(dim=-1)
        # What each visual token is attended to by, over all queries of its sample.
        queries = teacher.batch.real[:, :, None]
        attended = teacher.maps[(_LAYER,)].float().masked_fill(~queries, 0.0).sum(dim=1)
        columns = (teacher.batch.on_cpu().visual_index >= 0).nonzero(as_tuple=True)
        attended = attended[tuple(sent(index, attended.device) for index in columns)]
        losses = []
        for rows in samples_of(student.batch):
            focus = rows[attended[rows].topk(min(self.top, len(rows))).indices]
            losses.append(squared[rows].mean() + squared[focus].mean())
        loss = torch.stack(losses).sum()
        return Sums(loss, {self.name: loss.detach()})


class AlignKD(Method):
    """Distillation of cross-modal alignment in two stages, the terms the same in both."""

    name = "align_kd"
    recipe = ("dpt", "dft")
    teacher_stages = ("dpt", "dft")
    defaults = {"k": 16}

    def terms(self, stage: str, args: TrainingArguments) -> list[Term]:
        answers = AnswerTerm(args.lm_weight, args.kl_weight, args.kd_temperature)
        if stage not in self.teacher_stages:
            return [answers]
        return [answers, FirstLayerAttentionTerm(), VisualFeatureTerm(self.options["k"])]
