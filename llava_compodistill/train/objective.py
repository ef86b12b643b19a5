"""One micro-batch through teacher and student: the sums that make up L_LM, L_KL and L_ADL.

The trainer divides the sums by the counts of the whole optimizer step, over all micro-batches and ranks, so that
neither accumulation nor the number of ranks changes the loss.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..hosts.llava.model import llava_core, projector
from ..losses import attention_distillation_loss, attention_similarity, counting_samples
from ..pair.layers import match_layers, visual_understanding_layers
from ..pair.taf import TAFProjector
from ..pair.vision import has_adapter_of, same_tower, share_tower
from ..record.answers import TeacherAnswers, answer_loss_head, collect_teacher_answers
from ..record.attention import AttentionCapture, GroupMeans, capture_visual_attention
from ..record.encoding import encode_once, encode_separately
from ..record.merge import MergeRecorder, count_visual_tokens, record_merge
from .arguments import TrainingArguments, parse_band

logger = logging.getLogger(__name__)


@dataclass
class LossSums:
    """Sums over one micro-batch; `answers`, `lm` and `kl` over answer rows, the others over `samples` with an image.

    Gradients come from `answers`, the weighted sum of `lm` and `kl`, and from `attention`.
    """

    answers: torch.Tensor
    lm: torch.Tensor
    kl: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    similarity: torch.Tensor | None = None
    samples: torch.Tensor | None = None


class Objective:
    """Computes a stage's loss terms for a student and, in the distilled stages, its teacher.

    Args:
        student: the student, wrapped in PEFT or not.
        teacher: the frozen teacher, or None.
        args: stage, weights and the options of L_KL and L_ADL.
        vocab_size: size of the real vocabulary that both models share; L_KL runs over it, renormalised.

    Raises:
        ValueError: for bands that cannot be matched, or towers that do not go together.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, args: TrainingArguments, vocab_size: int | None = None
    ):
        self.student = llava_core(student)
        self.teacher = teacher
        self.args = args
        self.vocab_size = vocab_size
        self.student_layers: list[int] = []
        self.groups: list[list[int]] = []
        self.encodes_once = False
        self._recorder: MergeRecorder | None = None
        self._capture: AttentionCapture | None = None
        if teacher is not None:
            self._check_towers()
        if self.captures:
            self._match_layers()

    @property
    def captures(self) -> bool:
        """Whether attention maps are needed: for L_ADL, or to log the similarity without training on it."""
        return self.teacher is not None and (self.args.aligns_attention or self.args.measure_attention)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Open this around forward AND backward of a micro-batch: checkpointed layers run again in the backward."""
        with contextlib.ExitStack() as stack:
            self._recorder = stack.enter_context(record_merge(self.student))
            if self.captures:
                self._capture = stack.enter_context(
                    capture_visual_attention(
                        self.student,
                        self.student_layers,
                        lambda: self._recorder.batch,
                        impl=self.args.attention_map_impl,
                    )
                )
            try:
                yield
            finally:
                self._recorder = self._capture = None

    @property
    def is_running(self) -> bool:
        return self._recorder is not None

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> LossSums:
        """Run one micro-batch.

        Args:
            model: the student as the trainer wraps it (DDP, DeepSpeed); its forward is what is called.
            inputs: what LLaVA's collator gives: input_ids, labels, attention_mask, images.
        """
        if self._recorder is None:
            raise RuntimeError("Objective: call it inside `with objective.running():`.")
        answers, target_maps = None, None
        with contextlib.ExitStack() as stack:
            if self.encodes_once:
                stack.enter_context(encode_once(self.student, self.teacher))
            elif self.teacher is not None:
                stack.enter_context(encode_separately(self.student, self.teacher))
            if self.teacher is not None:
                answers, target_maps = self._run_teacher(inputs)
            if self._capture is not None:
                self._capture.begin()
                # Measuring alone needs no graph through the maps.
                self._capture.detach = not self.args.aligns_attention
            with answer_loss_head(
                self.student,
                self._recorder,
                answers,
                lm_weight=self.args.lm_weight,
                kl_weight=self.args.kl_weight,
                temperature=self.args.kd_temperature,
                vocab_size=self.vocab_size,
            ):
                outputs = model(**inputs)
        loss, lm, kl = outputs.logits.flatten().unbind()
        sums = LossSums(loss, lm.detach(), kl.detach() if answers is not None else None)
        if target_maps is not None:
            self._align(sums, target_maps)
        return sums

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any]) -> tuple[TeacherAnswers, list[torch.Tensor] | None]:
        teacher = self.teacher
        with contextlib.ExitStack() as stack:
            recorder = stack.enter_context(record_merge(teacher))
            answers = stack.enter_context(collect_teacher_answers(teacher, recorder))
            means = None
            if self.captures:
                means = GroupMeans(self.groups)
                stack.enter_context(
                    capture_visual_attention(
                        teacher,
                        means.layers,
                        lambda: recorder.batch,
                        impl=self.args.attention_map_impl,
                        receive=means.receive,
                    )
                )
            teacher(**{**inputs, "use_cache": False})
            batch = recorder.batch
        if means is None or batch.visual_index.shape[1] == 0:
            return answers[0], None
        self._teacher_visual_index = batch.visual_index
        return answers[0], means.means

    def _align(self, sums: LossSums, target_maps: list[torch.Tensor]) -> None:
        batch = self._recorder.batch
        if not torch.equal(batch.visual_index, self._teacher_visual_index):
            shapes = tuple(self._teacher_visual_index.shape), tuple(batch.visual_index.shape)
            raise ValueError(_OTHER_PLACES.format(what=f"{shapes[0]} and {shapes[1]} positions"))
        rows = batch.attention_rows(self.args.attention_rows)
        columns = batch.visual_index >= 0
        counts = counting_samples(rows)
        order = _another_image(batch.has_image) if self.args.shuffle_attention_targets else None
        losses, similarities = [], []
        for layer, target in zip(self.student_layers, target_maps, strict=True):
            if order is not None:
                target = target[order]
            student = self._capture.maps[layer]
            if self.args.aligns_attention and torch.is_grad_enabled() and not student.requires_grad:
                raise RuntimeError(
                    f"The attention map of student layer {layer} carries no gradient: L_ADL would train nothing. Are "
                    "the student's query and key projections frozen (--freeze_backbone, or LoRA without them)?"
                )
            options = dict(similarity=self.args.attention_similarity, column_mask=columns, reduction="none")
            if self.args.aligns_attention:
                losses.append(
                    attention_distillation_loss(student, target, rows, kind=self.args.attention_loss, **options)
                )
            if self.args.aligns_attention and self.args.attention_loss == "cosine":
                similarities.append(counts.to(student.dtype) - losses[-1].detach())
            else:
                similarities.append(attention_similarity(student.detach(), target, rows, **options))
        sums.similarity = torch.stack(similarities).mean(dim=0).sum()
        sums.samples = counts.sum()
        if losses:
            sums.attention = torch.stack(losses).mean(dim=0).sum()

    def _check_towers(self) -> None:
        same = same_tower(self.student, self.teacher)
        taf = isinstance(projector(self.student), TAFProjector)
        if taf and not same:
            mine, theirs = self.student.config, self.teacher.config
            raise ValueError(
                "TAF fetches the teacher's adapter, which reads the teacher's encoder: --vision_tower "
                f"{mine.mm_vision_tower} (layer {mine.mm_vision_select_layer}) is not the teacher's "
                f"{theirs.mm_vision_tower} (layer {theirs.mm_vision_select_layer})."
            )
        patches = count_visual_tokens(self.teacher), count_visual_tokens(self.student)
        if self.captures and patches[0] != patches[1]:
            raise ValueError(_OTHER_PLACES.format(what=f"{patches[0]} and {patches[1]} an image"))
        sizes = [model.get_vision_tower().config.image_size for model in (self.teacher, self.student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Teacher and student encoders take images of {sizes[0]} and {sizes[1]} pixels, and a batch holds "
                "each image once, prepared for the student: use the teacher's tower, or one of its image size."
            )
        self.encodes_once = same
        if same:
            share_tower(self.student, self.teacher)
        if taf and not has_adapter_of(self.student, self.teacher):
            logger.warning(
                "The student's frozen adapter is not this teacher's: was it distilled from another one so far? Each "
                "model keeps its own adapter."
            )
        both = (
            "encoder and teacher adapter run" if taf and has_adapter_of(self.student, self.teacher) else "encoder runs"
        )
        logger.info(
            "Vision: %s.",
            f"the {both} once a batch for both models" if same else "the towers differ, each model encodes the images",
        )
        # The sequences must be cut at the same length for their rows to correspond.
        self.teacher.config.tokenizer_model_max_length = getattr(
            self.student.config, "tokenizer_model_max_length", None
        )
        self.teacher.config.tokenizer_padding_side = getattr(self.student.config, "tokenizer_padding_side", "right")

    def _match_layers(self, distances: Any = None) -> None:
        args = self.args
        self.student_layers = visual_understanding_layers(
            self.student.config.num_hidden_layers, parse_band(args.student_layers, "student_layers")
        )
        teacher_layers = visual_understanding_layers(
            self.teacher.config.num_hidden_layers, parse_band(args.teacher_layers, "teacher_layers")
        )
        if args.layer_matching == "adaptive" and distances is None:
            # Until calibrate() has measured the distances any order-keeping match stands in.
            self.groups = match_layers(self.student_layers, teacher_layers, "simple")
            self._candidates = teacher_layers
            return
        self.groups = match_layers(self.student_layers, teacher_layers, args.layer_matching, distances=distances)
        logger.info(
            "L_ADL (%s): %s",
            args.layer_matching,
            ", ".join(f"{s} <- {g}" for s, g in zip(self.student_layers, self.groups, strict=True)),
        )

    @property
    def needs_calibration(self) -> bool:
        return self.captures and self.args.layer_matching == "adaptive"

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict[str, Any]]) -> None:
        """Measure the KL distance of each student layer's map to each teacher layer's; match by it (Appendix F)."""
        total: torch.Tensor | None = None
        for inputs in batches:
            student_maps, rows = self._all_maps(self.student, self.student_layers, inputs)
            teacher_maps, _ = self._all_maps(self.teacher, self._candidates, inputs)
            if not student_maps:
                continue  # a batch without an image
            distances = torch.stack(
                [
                    torch.stack(
                        [
                            attention_distillation_loss(student_maps[s], teacher_maps[t], rows, kind="kl")
                            for t in self._candidates
                        ]
                    )
                    for s in self.student_layers
                ]
            )
            total = distances if total is None else total + distances
        if total is None:
            raise ValueError("--layer_matching adaptive: the calibration batches hold no image.")
        self._match_layers(total.tolist())

    def _all_maps(self, model: nn.Module, layers: list[int], inputs: dict[str, Any]):
        with record_merge(model) as recorder:
            with capture_visual_attention(model, layers, lambda: recorder.batch) as capture:
                with collect_teacher_answers(model, recorder):
                    model(**inputs)
            return dict(capture.maps), recorder.batch.attention_rows(self.args.attention_rows)


_OTHER_PLACES = (
    "Teacher and student place visual tokens differently ({what}): L_ADL compares their attention token by token, so "
    "both need encoders with the same number of patches. Use the teacher's tower, or --vat False."
)


def _another_image(has_image: torch.Tensor) -> torch.Tensor:
    """[B] -> [B]: an order that gives every sample with an image the place of another such sample."""
    order = torch.arange(len(has_image), device=has_image.device)
    holders = has_image.nonzero().flatten()
    order[holders] = holders.roll(1)
    return order
