"""A method from outside the package, as a user would add one: features at visual tokens, with a trained map (the way
of LLaVADI's feature term), beside the answers."""

from __future__ import annotations

import torch
from torch import nn

from llava_compodistill.methods import Method, Sums, Term
from llava_compodistill.methods.answers import AnswerTerm
from llava_compodistill.record.forward import Needs


class FeatureTerm(Term):
    """Mean squared difference, over visual tokens, of W times layer 2 of the student and layer 3 of the teacher."""

    name = "features"
    count = "image_samples"
    weight = 0.5

    def prepare(self, pair):
        sizes = pair.student.config.hidden_size, pair.teacher.config.hidden_size
        self.module = nn.Linear(*sizes, bias=False)
        nn.init.normal_(self.module.weight, std=0.02, generator=torch.Generator().manual_seed(0))

    def needs(self):
        return Needs(hidden=frozenset({(2, "visual")})), Needs(hidden=frozenset({(3, "visual")}))

    def __call__(self, student, teacher, returned):
        mine, target = student.hidden[2, "visual"], teacher.hidden[3, "visual"]
        if not len(mine):
            return Sums(None, {self.name: target.new_zeros(())})
        squared = (self.module(mine).float() - target.float()).square().mean(dim=1)
        loss = squared.sum() * student.batch.has_image.sum() / len(squared)
        return Sums(loss, {self.name: loss.detach()})


class Toy(Method):
    name = "toy"
    teacher_stages = ("dft",)

    def terms(self, stage, args):
        return [AnswerTerm(kl_weight=0.0), FeatureTerm()] if stage == "dft" else [AnswerTerm()]
