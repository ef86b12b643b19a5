"""One micro-batch through teacher and student: the passes that a method's terms ask for, and the terms' sums.

The trainer divides the sums by the counts of the whole optimizer step, over all micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import nn

from ..hosts import host_of
from ..hosts.base import kept_on_cpu, on_cpu, sent
from ..methods import Sums, Term
from ..methods.base import prepared
from ..pair import Pair
from ..pair.layers import visual_understanding_layers
from ..pair.tokens import TEACHER, students_inputs, teachers_inputs
from ..record.encoding import encode_for, encoded_as, keep_features
from ..record.forward import Needs, Pass, PassRecorder, record
from ..record.recompute import recomputed
from ..record.sight import without_sight
from .cache.teacher import CachedTeacher
from .calibration import Calibration
from .facts import OWN


class Objective:
    """Computes a list of terms for a student and, where there is one, its teacher.

    Args:
        student: the student, wrapped in PEFT or not.
        teacher: the frozen teacher, a `CachedTeacher`, or None.
        terms: of a method's stage.
        vocab_size: size of the real vocabulary that both models share; L_KL runs over it, renormalised.
        teacher_vocab_size: that of a teacher with another tokenizer; `vocab_size` is the student's then, and batches
            hold what the teacher reads under `pair.tokens.TEACHER`.
        impl: implementation of the attention map op, see `visual_attention_map`.
        padding_free: whether the layers of both models run on real tokens alone (`record.padding`).
        image_layers: a band: in the student's other layers, text attends to text alone (`without_sight`).

    Raises:
        ValueError: for layers that the student lacks, for towers that do not go together, and for terms that cannot
            run on this pair.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | CachedTeacher | None,
        terms: Sequence[Term],
        vocab_size: int | None = None,
        impl: str = "auto",
        teacher_vocab_size: int | None = None,
        image_layers: str | Sequence[int] = "all",
        padding_free: bool = False,
    ):
        names = [term.name for term in terms]
        if not terms:
            raise ValueError("The method has no term for this stage: there is nothing to train with.")
        if len(set(names)) < len(names):
            raise ValueError(f"Two terms of a method have one name: {', '.join(names)}.")
        self.pair = Pair.of(student, teacher, vocab_size, teacher_vocab_size)
        self.terms, self.impl = prepared(terms, self.pair), impl
        #: what every pass is recorded with
        self.options = {"impl": impl, "padding_free": padding_free}
        if teacher is not None:
            self.pair.share_vision()
        layers = self.pair.student.config.num_hidden_layers
        self._blind_layers = sorted(set(range(layers)) - set(visual_understanding_layers(layers, image_layers)))
        self._recorder: PassRecorder | None = None
        self._open: contextlib.ExitStack | None = None
        self._teacher_pass: Pass | None = None
        self._own: torch.Tensor | None = None
        self._cached: Mapping[str, Any] | None = None
        self._switch: Callable[[], Pass | None] = _no_pass
        self._widths: dict[str, int] = {}
        self._sums: dict[str, Sums] = {}
        self._partitioned: bool | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher in memory."""
        return None if self.pair.cached else self.pair.teacher

    def term(self, name: str) -> Term:
        """The term of a name.

        Raises:
            KeyError: when there is none.
        """
        return {term.name: term for term in self.terms}[name]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The terms' own trained weights, by term."""
        return {term.name: term.module for term in self.terms if term.module is not None}

    def _needs(self) -> tuple[Needs, Needs]:
        return _union(term.needs() for term in self.terms)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Open this around forward AND backward of a micro-batch: checkpointed layers run again in the backward."""
        options = {**self.options, "on_head": self._on_head, "on_end": self._on_end}
        with contextlib.ExitStack() as stack:
            self._open = stack
            self._recorder = recorder = stack.enter_context(record(self.pair.student, self._needs()[0], **options))
            if self._blind_layers:
                stack.enter_context(without_sight(self.pair.student, self._blind_layers, lambda: recorder.batch))
            try:
                yield
            finally:
                self._recorder = self._teacher_pass = self._cached = self._open = None
                self._switch = _no_pass

    @property
    def is_running(self) -> bool:
        return self._recorder is not None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Sums]:
        """Run one micro-batch.

        Args:
            model: the student as the trainer wraps it (DDP, DeepSpeed); its forward is what is called.
            inputs: what LLaVA's collator gives: input_ids, labels, attention_mask, images; for a teacher with another
                tokenizer what `TeacherTextCollator` adds, for one in a cache what `CacheCollator` does, and OWN where
                the student has answered samples itself.

        Returns:
            Each term's sums, by name.
        """
        if self._recorder is None:
            raise RuntimeError("Objective: call it inside `with objective.running():`.")
        self._own = inputs.get(OWN)
        inputs = {name: value for name, value in inputs.items() if name != OWN}
        self._cached = inputs.get(TEACHER) if self.pair.cached else None
        with encode_for(self.pair), self._switching(inputs):
            self._teacher_pass = self.run_teacher(inputs, self._needs()[1])
            self._run_blind(inputs, self._teacher_pass)
            returned = model(**students_inputs(inputs))
        sums, self._sums, self._teacher_pass = self._sums, {}, None
        # What came out of the wrappers carries their hooks on the way back; what went in does not.
        for name, loss in returned.items():
            sums[name].loss = loss
        return sums

    def total(
        self, sums: Mapping[str, Sums], counts: Mapping[str, torch.Tensor], weights: Mapping[str, float]
    ) -> torch.Tensor:
        """The weighted sum of the terms that have met something.

        Args:
            sums: of a micro-batch, by term; `counts`, by kind (`COUNTS`), is what they are divided by.
            weights: by term.
        """
        parts = [
            weights[term.name] * sums[term.name].loss / counts[term.count]
            for term in self.terms
            if sums[term.name].loss is not None
        ]
        return sum(parts[1:], parts[0])

    def run_teacher(self, inputs: Mapping[str, Any], needs: Needs) -> Pass | None:
        """The teacher's pass over a batch, inside `encode_for`; None where there is none, or not yet (of a cache it is
        made when the student's forward has placed the batch's tokens)."""
        if self.teacher is None:
            return None
        given = {**teachers_inputs(inputs, self.pair.shares_tokenizer), "use_cache": False}
        aligned = given.pop("aligned", None)
        with torch.no_grad(), record(self.pair.teacher, needs, **self.options) as recorder:
            self.pair.teacher(**given)
            recorder.latest.aligned = aligned
            return recorder.latest

    def _run_blind(self, inputs: Mapping[str, Any], sighted: Pass | None) -> None:
        """Let the teacher read once more, without their images, the samples that have one, where a term asks."""
        asked = [needs for needs in (term.blind_needs() for term in self.terms) if needs is not None]
        if not asked or sighted is None or not sighted.batch.visual_index.shape[1]:
            return
        teacher = self.pair.teacher
        with_image = sighted.batch.on_cpu().has_image.nonzero()[:, 0]
        given = teachers_inputs(inputs, self.pair.shares_tokenizer)
        texts = ("input_ids", "labels", "attention_mask")
        here = {name: on_cpu(given[name]) for name in texts if given.get(name) is not None}
        here = host_of(teacher).text_alone(here, with_image)
        text = {name: sent(value, given["input_ids"].device) for name, value in here.items()}
        kept = kept_on_cpu([(text[name], here[name]) for name in here])
        with kept, torch.no_grad(), record(teacher, reduce(or_, asked), **self.options) as recorder:
            teacher(**text, use_cache=False)
            sighted.blind = recorder.latest

    @contextlib.contextmanager
    def _switching(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the student's forward can end with the teacher's on the same visual features, where a term asks."""
        asked = [needs for needs in (term.switched_needs() for term in self.terms) if needs is not None]
        if not asked:
            yield
            return
        needs = reduce(or_, asked)
        with keep_features(self.pair.student) as features:
            self._switch = lambda: self._run_switched(inputs, needs, features.pop()) if features else None
            try:
                yield
            finally:
                self._switch = _no_pass

    def _run_switched(self, inputs: Mapping[str, Any], needs: Needs, features: torch.Tensor) -> Pass:
        """The teacher on the student's features: its weights are frozen, and gradients reach the student's encoder."""
        teacher = self.pair.teacher
        saving = getattr(self.pair.student, "is_gradient_checkpointing", False)
        # Open until the backward has ended, in which its layers run again.
        if saving:
            self._open.enter_context(recomputed(teacher))
        recorder = self._open.enter_context(record(teacher, needs, **self.options))
        with encoded_as(teacher, features):
            teacher(**{**inputs, "use_cache": False})
        return recorder.latest

    def _on_head(self, student: Pass) -> torch.Tensor:
        student.own = self._own
        if self.pair.cached:
            self._teacher_pass = self.pair.teacher.read(self._cached, student.batch)
        values = {term.name: term.on_head(student, self._teacher_pass) for term in self.terms}
        values = {name: value for name, value in values.items() if value is not None}
        self._widths = {name: len(value) for name, value in values.items()}
        return torch.cat(list(values.values())) if values else student.batch.labels.new_zeros(0, dtype=torch.float32)

    def _on_end(self, student: Pass) -> dict[str, torch.Tensor]:
        """The terms, inside the student's wrappers: their losses leave the model under their names."""
        if student.batch.visual_index.shape[1]:  # text alone has nothing to switch
            student.switched = self._switch()
        returned = dict(zip(self._widths, student.returned.split(list(self._widths.values())), strict=True))
        self._sums = {term.name: term(student, self._teacher_pass, returned.get(term.name)) for term in self.terms}
        for term in self.terms:
            # Every rank has to reach the same weights in every step, also where a term has met nothing.
            if self._sums[term.name].loss is None and term.module is not None:
                self._sums[term.name].loss = _zero_of(term.module)
        if all(sums.loss is None for sums in self._sums.values()):
            self._sums[self.terms[0].name].loss = _zero_of(self.pair.student)
        if self._partitioned is None:  # known with the first micro-batch, in which DeepSpeed has the weights
            self._partitioned = any(hasattr(weight, "ds_id") for weight in self.pair.student.parameters())
        if self._partitioned:
            self._lose_everywhere()
        return {name: sums.loss for name, sums in self._sums.items() if sums.loss is not None}

    def _lose_everywhere(self) -> None:
        """Give a loss to the terms that have met nothing, such as L_ADL in text alone. The ranks of ZeRO-3 expect the
        same hooks of each other in every micro-batch, and these hang on the losses: they would wait forever."""
        met = next(sums.loss for sums in self._sums.values() if sums.loss is not None)
        for sums in self._sums.values():
            if sums.loss is None:
                sums.loss = 0.0 * met

    # -----------------------------------------------------------------------------------------------------------------
    # Before training
    # -----------------------------------------------------------------------------------------------------------------
    @property
    def calibrated_by(self) -> dict[str, str]:
        """By name, the terms that look at data before training, and the flags that make them."""
        return {term.name: term.calibrated_by for term in self.terms if term.calibrated_by}

    @property
    def calibration_batches(self) -> int:
        """How many batches `calibrate` has to see."""
        return max((term.calibration_batches for term in self.terms), default=0)

    @property
    def calibration_samples(self) -> int:
        """How many samples with an image `calibrate` has to see."""
        return max((term.calibration_samples for term in self.terms), default=0)

    @torch.no_grad()
    def calibrate(
        self, batches: Sequence[Mapping[str, Any]], with_image: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """Let the terms that ask for it look at data; returns what they found, for `use`.

        Args:
            batches: as in training.
            with_image: batches of samples with an image.
        """
        data = Calibration(self, batches, with_image)
        return {term.name: term.calibrate(data) for term in self.terms if term.calibrated_by}

    def use(self, calibrated: Mapping[str, Any]) -> None:
        """Give the terms what `calibrate` found, here or on another rank."""
        for name, found in calibrated.items():
            self.term(name).use(found)


def _no_pass() -> None:
    """Where no term asks for a pass."""


def _zero_of(module: nn.Module) -> torch.Tensor:
    """0, with a graph to all trained weights."""
    return 0.0 * sum(parameter.float().sum() for parameter in module.parameters() if parameter.requires_grad)


def _union(needs: Iterable[tuple[Needs, Needs]]) -> tuple[Needs, Needs]:
    students, teachers = zip(*needs, strict=True)
    return reduce(or_, students, Needs()), reduce(or_, teachers, Needs())
