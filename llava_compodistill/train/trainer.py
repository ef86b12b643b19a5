"""CompoDistillTrainer: LLaVA's trainer with the terms of a method (paper, Section 4.3).

Every term is a sum over the micro-batch divided by a count over the whole optimizer step: answer tokens for L_LM and
L_KL, samples with an image for L_ADL. So batch 1 with 8 accumulation steps is batch 8, and two ranks are one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer_utils import TrainOutput

from .. import compat
from ..hosts.base import sent
from ..hosts.llava.model import count_visual_tokens, llava_core
from ..hosts.llava.training import LLaVATrainer
from ..methods import Sums
from ..methods.base import COUNTS
from ..pair.layers import parse_band
from ..pair.student import computing
from . import checkpoint, compiling, facts, placing, sharding, travel
from .answer_watch import AnswerWatch
from .arguments import TrainingArguments
from .cache.teacher import CachedTeacher
from .calibration import Batches, read_calibration, refuse_zero3, samples_with_image, write_calibration
from .facts import BatchFacts, CountingCollator
from .finite import refuse_broken_gradient, refuse_broken_weights
from .mix import Mix, write_manifest
from .objective import Objective
from .on_policy import PARTITIONED, refuse_other_tokenizer
from .overhead import CountsOnce
from .own_answers import OwnAnswers
from .pickles import loads_tensors_alone
from .preempt import StopOnSignal, shield_workers
from .samplers import SeededLengthGroupedSampler, SeededRandomSampler, TellEpoch, samples_of
from .sight import SightGuard, can_measure
from .teacher_text import TeacherText
from .terms_log import TermsLog

logger = logging.getLogger(__name__)


class CompoDistillTrainer(CountsOnce, LLaVATrainer):
    """Trains a student in one of the stages pt, dpt, dft, sft by the method that `args.method` names.

    Args:
        teacher: the frozen teacher, for stages that need one. It is kept outside the student: in no state dict, in no
            optimizer. Or a `CachedTeacher`; the data then come from `make_data_module(..., cache=)`.
        tokenizer: saved beside the student; its length bounds the vocabulary that L_KL runs over.
        teacher_text: how a teacher with another tokenizer reads the samples (`find_teacher_text`); the data come from
            `make_data_module(..., teacher=teacher_text)`.
        shared_tokens: the tokens that L_KL runs over, where the teacher's tokenizer lacks some of the student's.
        Other arguments as for `transformers.Trainer`.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        teacher: nn.Module | CachedTeacher | None = None,
        tokenizer: Any = None,
        teacher_text: TeacherText | None = None,
        shared_tokens: int | None = None,
        **kwargs: Any,
    ):
        if args.distilled and teacher is None:
            raise ValueError(f"Stage {args.stage} distils from a teacher: pass teacher=load_teacher(path).")
        refuse_other_tokenizer(args, teacher_text)
        if args.paired != getattr(kwargs.get("train_dataset"), "paired", args.paired):
            raise ValueError(
                f"Stage {args.stage} of {args.method} takes {'pairs of answers' if args.paired else 'single samples'}"
                f": make the data with make_data_module(..., paired={args.paired})."
            )
        self.objective = Objective(
            model,
            teacher if args.distilled else None,
            args.chosen_method.terms(args.stage, args),
            vocab_size=len(tokenizer) if shared_tokens is None and tokenizer is not None else shared_tokens,
            impl=args.attention_map_impl,
            teacher_vocab_size=None if teacher_text is None else len(teacher_text.tokenizer),
            image_layers=parse_band(args.image_layers),
            padding_free=args.padding_free,
        )
        checkpoint.attach_modules(model, self.objective.modules)
        compiling.use_liger(model, self.objective.teacher, args)
        sharding.hold_alike(model, args)
        super().__init__(model=model, args=args, **compat.tokenizer_argument(tokenizer), **kwargs)
        sharding.prepare(self)
        if args.n_gpu > 1:
            raise ValueError(
                "Several GPUs in one process (DataParallel) are not supported: use torchrun or deepspeed."
            )
        core = llava_core(model)
        self._limit = getattr(core.config, "tokenizer_model_max_length", None)
        theirs = None
        if teacher_text is not None:
            theirs = count_visual_tokens(teacher), teacher.config.tokenizer_model_max_length
        counted = count_visual_tokens(core), self._limit, theirs
        pixels = travel.pixel_dtype(self.objective.pair, self.train_dataset)
        self.data_collator = CountingCollator(self.data_collator, *counted, pixels)
        self._own: OwnAnswers | None = None
        if args.on_policy:
            if self.is_fsdp_enabled:
                raise ValueError(f"--on_policy {args.on_policy:g}: not with FSDP, {PARTITIONED}")
            self._own = OwnAnswers(model, tokenizer, self.data_collator, args, self._limit)
        self.tokenizer_to_save = tokenizer
        self.train_sampler: Any = None
        self._gathered: tuple[dict | None, dict | None] = None, None
        self._calibrated: dict[str, Any] | None = None
        self.add_callback(TellEpoch(self))
        self._stop = StopOnSignal()
        self.add_callback(self._stop)
        self._sight = SightGuard(self) if args.blind != "off" and can_measure(self.train_dataset) else None
        if self._sight is not None:
            self.add_callback(self._sight)
        # The loss arrives normalised over the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self._counts: dict[str, torch.Tensor] | None = None
        self._answers = AnswerWatch(self._limit, self.objective.pair.shares_tokenizer)
        self._waiting: list[dict[str, Any]] = []
        self._terms_log = TermsLog(self.accelerator, args)
        self._placed: tuple[str, Any] | None = None  # see `placing`

    def create_optimizer(self, *args, **kwargs):
        """LLaVA's, with the encoder's rate where it has one."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.mm_vision_tower_lr
        if rate is not None:
            tower = {id(parameter) for parameter in llava_core(self.model).get_vision_tower().parameters()}
            for group in list(optimizer.param_groups):
                encoder = [parameter for parameter in group["params"] if id(parameter) in tower]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in tower]
                if encoder:
                    optimizer.add_param_group({**group, "params": encoder, "lr": rate})
        return optimizer

    # -----------------------------------------------------------------------------------------------------------------
    # Loss
    # -----------------------------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        """The weighted sum of the stage's terms for one micro-batch, normalised over the optimizer step."""
        in_step = self.objective.is_running
        # Outside of training_step (evaluation) there is no window, and nothing has opened the context yet.
        counts = self._counts if in_step else self._count([inputs], training=False)
        found = inputs.get(facts.KEY)
        inputs = {name: value for name, value in inputs.items() if name not in (facts.KEY, compiling.SKIP_LOGITS)}
        inputs = {**self._prepare_inputs(inputs), "use_cache": False}
        with facts.kept(found, inputs), contextlib.nullcontext() if in_step else self.objective.running():
            sums = self.objective(model, inputs)
        weights = self._weights(self.state.global_step)
        self._remember(sums, counts, weights, in_step)
        loss = self.objective.total(sums, counts, weights)
        # DDP, FSDP and DeepSpeed average gradients over ranks; our counts are over ranks already.
        loss = loss * self.accelerator.num_processes
        if in_step and compat.divides_by_accumulation(self):
            loss = loss * self.args.gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss

    def _weights(self, step: int) -> dict[str, float]:
        """The terms' weights in the optimizer step that comes after `step` others of this stage."""
        progress = step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        return {term.name: term.weight_at(progress) for term in self.objective.terms}

    # -----------------------------------------------------------------------------------------------------------------
    # One optimizer step = one window of micro-batches
    # -----------------------------------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        """Since transformers 4.46: collect the window; here, also count what its losses are divided by."""
        window, _ = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        window = self._with_own_answers(window)
        self._counts = self._count(window) if window else None
        return window, None if self._counts is None else self._counts["answer_tokens"]

    def training_step(self, model, inputs, *args, **kwargs):
        """One micro-batch forward and backward, with the attention taps open throughout."""
        if compat.hands_out_windows(self):
            with self.objective.running():
                return super().training_step(model, inputs, *args, **kwargs)
        # Before 4.46 micro-batches come one by one: keep them until the window is whole, then run it.
        self._waiting.append(inputs)
        if not compat.ends_window(self):
            return torch.zeros((), device=self.args.device)
        window, self._waiting = self._with_own_answers(self._waiting), []
        self._counts = self._count(window)
        total = torch.zeros((), device=self.args.device)
        for position, waiting in enumerate(window):
            last = position == len(window) - 1
            if last and not self.accelerator.sync_gradients:
                self.accelerator.trigger_sync_in_backward(model)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model), self.objective.running():
                total += super().training_step(model, waiting)
        return total

    def _with_own_answers(self, window: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The window, with answers of the student where they are drawn (`--on_policy`)."""
        if self._own is None:
            return window
        return self._own.replace(window, self.state.global_step, self._prepare_inputs)

    def _count(self, window: list[dict[str, Any]], training: bool = True) -> dict[str, torch.Tensor]:
        """Each of COUNTS, of a window over all ranks; never zero, so nothing divides by it."""
        found = [self._facts(batch) for batch in window]
        if training:
            self._answers.look(found, self.state.global_step + 1)
            if self._own is not None:
                self._own.measure(found, self.state.global_step, self._terms_log)
        sums = [sum(getattr(batch, name) for batch in found) for name in COUNTS]
        counts = self._sum_over_ranks(sent(torch.tensor(sums, dtype=torch.float32), self.args.device))
        return dict(zip(COUNTS, counts.clamp(min=1), strict=True))

    def _facts(self, batch: dict[str, Any]) -> BatchFacts:
        """The collator's; a batch that was made elsewhere is counted here, on its device."""
        return batch[facts.KEY] if facts.KEY in batch else self.data_collator.facts(batch)

    # -----------------------------------------------------------------------------------------------------------------
    # Logging
    # -----------------------------------------------------------------------------------------------------------------
    def _remember(
        self, sums: dict[str, Sums], counts: dict[str, torch.Tensor], weights: dict[str, float], in_step: bool
    ) -> None:
        """Keep the terms for the next log; those of an evaluation are looked at at once, and forgotten."""
        log = self._terms_log if in_step else TermsLog(self.accelerator, self.args)
        for term in self.objective.terms:
            log.add(self.state.global_step, term, sums[term.name], counts[term.count], weights[term.name])
        if not in_step:
            log.read(self.state.global_step)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the terms, unweighted: each the mean over the optimizer steps since the last log, over ranks; the
        similarity over the samples with an image, left out where there was none; and of a weight that changes, what it
        was in the last of these steps."""
        if "loss" in logs and self._terms_log:
            terms = self._terms_log.take(self.state.global_step)
            refuse_broken_gradient(logs.get("grad_norm"), self.state.global_step, self.args)
            sight = None if self._sight is None else self._sight.take()
            if sight is not None:
                terms["sight"] = sight
            if self._own is not None:
                terms["generating"] = self._own.take_time(self.accelerator)
            weights = self._weights(self.state.global_step - 1)
            terms |= {f"{term.name}_weight": weights[term.name] for term in self.objective.terms if term.schedule}
            logs.update({name: round(value, 6) for name, value in terms.items()})
        super().log(logs, *args, **kwargs)

    def _refuse_broken(self) -> None:
        """Nothing that is not finite is saved, and no good checkpoint gives way to it."""
        if self._terms_log:
            self._terms_log.read(self.state.global_step)
        refuse_broken_weights(self.model, self._sum_over_ranks, self.state.global_step, self.args)

    # -----------------------------------------------------------------------------------------------------------------
    # Data order
    # -----------------------------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed_of_data
        if self.args.group_by_modality_length:
            self.train_sampler = SeededLengthGroupedSampler(
                self.args.train_batch_size,
                world_size=self.args.world_size * self.args.gradient_accumulation_steps,
                lengths=dataset.modality_lengths,
                group_by_modality=True,
                seed=seed,
            )
        elif compat.SEEDS_SAMPLER:
            self.train_sampler = transformers.Trainer._get_train_sampler(self, dataset)
        else:
            self.train_sampler = SeededRandomSampler(len(dataset), seed)
        return self.train_sampler

    def get_train_dataloader(self):
        return shield_workers(travel.without_waiting(super().get_train_dataloader(), self.args))

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train to the end, or until a signal stops the run: `preempt.Preempted`, its checkpoint saved."""
        self._move_teacher()
        if resume_from_checkpoint and self.is_fsdp_enabled:
            # While the weights are still whole: afterwards each rank has its part of them alone.
            checkpoint.load_into(self.model, resume_from_checkpoint)
        if self.objective.calibrated_by:
            self._calibrate(resume_from_checkpoint)
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            path = os.path.join(resume_from_checkpoint, "trainer_state.json")
            state = transformers.TrainerState.load_from_json(path)
            if 0 < self.args.max_steps <= state.global_step:
                # Resumed at its end, transformers would make one step too many.
                logger.info("%s is this run's last step: nothing is left to train.", resume_from_checkpoint)
                self.state = state
                self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        try:
            unwaited = travel.resuming_without_waiting(self.args)
            with sharding.resuming_lora(self.model), unwaited, compiling.compiled(self):
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._stop.restore()
        self._answers.report(self.accelerator)
        if self._own is not None:
            self._own.report(self.accelerator)
        return result

    def _inner_training_loop(self, *args, **kwargs):
        """With this command's micro-batch: 4.37 takes a checkpoint's, whose accumulation may have been another."""
        if "batch_size" in kwargs and not self.args.auto_find_batch_size:
            kwargs["batch_size"] = self.args.train_batch_size
        return super()._inner_training_loop(*args, **kwargs)

    def _calibrate(self, resumed: str | None) -> None:
        """Let the terms look at data, the same on every rank; or take what the checkpoint has that is resumed."""
        found = read_calibration(resumed, self.objective.calibrated_by) if resumed else None
        if found is None:
            found = self._look_at_data()
        # Equal by construction, not by the hope that every rank rounds alike.
        self._calibrated = broadcast_object_list([found])[0]
        self.objective.use(self._calibrated)

    def _look_at_data(self) -> dict[str, Any]:
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            refuse_zero3(self.objective.calibrated_by)
        data, size = self.train_dataset, self.args.per_device_train_batch_size
        first = range(min(len(data), size * self.objective.calibration_batches))
        wanted = self.objective.calibration_samples
        with_image = samples_with_image(data, wanted, self.args.seed_of_data) if wanted else []
        student = self.objective.pair.student
        if not getattr(student, "is_quantized", False):  # which is where it was loaded, and cannot be moved
            student.to(self.args.device)
        training = student.training
        student.eval()
        try:
            with computing(self.args):  # nothing has wrapped the models for mixed precision yet
                parts = (data, first), (samples_of(data), with_image)
                return self.objective.calibrate(*(Batches(*part, size, self._batch) for part in parts))
        finally:
            student.train(training)

    def _batch(self, samples: list[Any]) -> dict[str, Any]:
        """Samples as the models take them, before training has wrapped anything."""
        batch = self.data_collator(samples)
        batch.pop(facts.KEY)
        return {**self._prepare_inputs(batch), "use_cache": False}

    def _move_teacher(self) -> None:
        if self.objective.teacher is not None and self._placed is None:
            self._placed = placing.place(self)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # -----------------------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model, trial, *args, **kwargs):
        self._refuse_broken()
        # Not LLaVATrainer's: it saves an adapter without the state that resuming needs.
        save = functools.partial(transformers.Trainer._save_checkpoint, self, model, trial, *args, **kwargs)
        with self._stop.saving_all(self.args), sharding.without_second_weights():
            checkpoint.save_sealed(self, save)
        self._stop.leave(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self._refuse_broken()
        # On every rank; what follows runs on one.
        self._gathered = checkpoint.adapter_weights(self.model), checkpoint.module_weights(self.model)
        if self.is_fsdp_enabled:
            weights = sharding.gather_weights(self.model, checkpoint.saves_trained_alone(self.model, self.args))
            self._save(output_dir, weights)
        else:
            super().save_model(output_dir, _internal_call)
        self._gathered = None, None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            checkpoint.save(self.model, output_dir, self.args, self.tokenizer_to_save, state_dict, *self._gathered)
            samples = getattr(self.train_dataset, "list_data_dict", None)
            if isinstance(samples, Mix):
                write_manifest(output_dir, samples.manifest())
            if self._calibrated is not None:
                write_calibration(output_dir, self.objective.calibrated_by, self._calibrated)

    def save_state(self) -> None:
        """On every machine that has a folder of its own: transformers writes the first one's alone."""
        super().save_state()
        if self.args.should_save and not self.is_world_process_zero():
            self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))

    def _load_rng_state(self, checkpoint):
        with compat.reads_own_rng_state() as can, loads_tensors_alone() if can else contextlib.nullcontext():
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with contextlib.nullcontext() if self.args.trust_checkpoint else loads_tensors_alone():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.is_fsdp_enabled:  # `train` has done it
            checkpoint.load_into(self.model if model is None else model, resume_from_checkpoint)
