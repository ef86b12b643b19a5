"""CompoDistillTrainer: LLaVA's trainer with the losses of DPT, DFT and SFT (paper, Section 4.3).

Every loss term is a sum over the micro-batch divided by a count over the whole optimizer step: answer tokens for
L_LM and L_KL, samples with an image for L_ADL. So batch 1 with 8 accumulation steps is batch 8, and two ranks are
one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Sampler

from .. import compat
from ..errors import NonFiniteLossError
from ..hosts.llava.host import import_llava
from ..hosts.llava.model import llava_core
from ..pair.student import compute_dtype
from ..record.merge import IGNORE_INDEX
from . import checkpoint
from .arguments import TrainingArguments
from .objective import LossSums, Objective

_llava_trainer = import_llava("llava.train.llava_trainer")
IMAGE_TOKEN_INDEX = import_llava("llava.constants").IMAGE_TOKEN_INDEX

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What the sums of one optimizer step are divided by, over all its micro-batches and ranks."""

    answer_tokens: torch.Tensor
    image_samples: torch.Tensor


class SeededRandomSampler(Sampler):
    """A shuffled order that depends on the seed and the epoch alone: the same after resuming and on every rank."""

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return iter(
            torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        )


class SeededLengthGroupedSampler(_llava_trainer.LengthGroupedSampler):
    """LLaVA's grouping by modality and length, drawn from the seed and the epoch instead of the global state, so that
    a resumed run sees the order of an unbroken one."""

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            return iter(list(super().__iter__()))


class TellEpoch(transformers.TrainerCallback):
    """Tell the sampler its epoch: on several ranks older releases of accelerate do not."""

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = self.trainer.train_sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))


class CompoDistillTrainer(_llava_trainer.LLaVATrainer):
    """Trains a student in one of the stages pt, dpt, dft, sft.

    Args:
        teacher: the frozen teacher for dpt and dft. It is kept outside the student: in no state dict, in no optimizer.
        tokenizer: saved beside the student; its length bounds the vocabulary that L_KL runs over.
        Other arguments as for `transformers.Trainer`.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        teacher: nn.Module | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        if args.distilled and teacher is None:
            raise ValueError(f"Stage {args.stage} distils from a teacher: pass teacher=load_teacher(path).")
        self.objective = Objective(
            model, teacher if args.distilled else None, args, None if tokenizer is None else len(tokenizer)
        )
        super().__init__(model=model, args=args, **compat.tokenizer_argument(tokenizer), **kwargs)
        if args.n_gpu > 1:
            raise ValueError(
                "Several GPUs in one process (DataParallel) are not supported: use torchrun or deepspeed."
            )
        self.tokenizer_to_save = tokenizer
        self.train_sampler: Any = None
        self._adapter: dict[str, torch.Tensor] | None = None
        self.add_callback(TellEpoch(self))
        # The loss arrives normalised over the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self._counts: Counts | None = None
        self._seen_samples = self._cut_samples = 0  # of this process, see _watch_answers
        self._waiting: list[dict[str, Any]] = []
        self._unlogged: torch.Tensor | None = None  # running sums since the last log, see _remember
        self._logged_step = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Loss
    # -----------------------------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        """The weighted sum of the stage's terms for one micro-batch, normalised over the optimizer step."""
        inputs = {**self._prepare_inputs(inputs), "use_cache": False}
        in_step = self.objective.is_running
        # Outside of training_step (evaluation) there is no window, and nothing has opened the context yet.
        counts = self._counts if in_step else self._count([inputs], training=False)
        with contextlib.nullcontext() if in_step else self.objective.running():
            sums = self.objective(model, inputs)
        self._stop_if_not_finite(sums)
        if in_step:
            self._remember(sums, counts)
        loss = sums.answers / counts.answer_tokens
        if sums.attention is not None:
            loss = loss + self.args.attention_weight * sums.attention / counts.image_samples
        # DDP, FSDP and DeepSpeed average gradients over ranks; our counts are over ranks already.
        loss = loss * self.accelerator.num_processes
        if in_step and compat.divides_by_accumulation(self):
            loss = loss * self.args.gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss

    def _stop_if_not_finite(self, sums: LossSums) -> None:
        terms = {name: getattr(sums, name) for name in ("lm", "kl", "attention")}
        terms = {name: getattr(self.args, f"{name}_weight") * term for name, term in terms.items() if term is not None}
        finite = torch.isfinite(torch.stack([term.detach().float() for term in terms.values()]))
        if not finite.all():
            names = [name for name, good in zip(terms, finite.tolist(), strict=True) if not good]
            raise NonFiniteLossError(
                f"Step {self.state.global_step + 1}: the loss term{'s' * (len(names) > 1)} {', '.join(names)} became "
                f"{terms[names[0]].item()}. "
                + (
                    "fp16 overflows on this model: use --bf16 True, or --fp16 False."
                    if self.args.fp16
                    else "Lower --learning_rate, or look at the data of this step."
                )
                + f" Checkpoints in {self.args.output_dir} are untouched."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # One optimizer step = one window of micro-batches
    # -----------------------------------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        """Since transformers 4.46: collect the window; here, also count what its losses are divided by."""
        window, _ = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        self._counts = self._count(window) if window else None
        return window, None if self._counts is None else self._counts.answer_tokens

    def training_step(self, model, inputs, *args, **kwargs):
        """One micro-batch forward and backward, with the attention taps open throughout."""
        if compat.hands_out_windows(self):
            with self.objective.running():
                return super().training_step(model, inputs, *args, **kwargs)
        # Before 4.46 micro-batches come one by one: keep them until the window is whole, then run it.
        self._waiting.append(inputs)
        if not compat.ends_window(self):
            return torch.zeros((), device=self.args.device)
        window, self._waiting = self._waiting, []
        self._counts = self._count(window)
        total = torch.zeros((), device=self.args.device)
        for position, waiting in enumerate(window):
            last = position == len(window) - 1
            if last and not self.accelerator.sync_gradients:
                self.accelerator.trigger_sync_in_backward(model)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model), self.objective.running():
                total += super().training_step(model, waiting)
        return total

    def _count(self, window: list[dict[str, Any]], training: bool = True) -> Counts:
        """Answer tokens and samples with an image of a window over all ranks; never zero, so nothing divides by it."""
        tokens = [count for batch in window for count in self._answer_tokens(batch)]
        images = sum(int((batch["input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1).sum()) for batch in window)
        if training:
            self._watch_answers(tokens)
        counts = torch.tensor([sum(tokens), images], dtype=torch.float32, device=self.args.device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return Counts(*counts.clamp(min=1))

    def _answer_tokens(self, batch: dict[str, Any]) -> list[int]:
        """Of each sample the answer tokens that the model will predict: LLaVA cuts the merged sequence, images
        included, at its limit."""
        labels, ids = batch["labels"], batch["input_ids"]
        core = llava_core(self.model)
        images = batch.get("images")
        image_width = 1
        if torch.is_tensor(images) and images.ndim == 4:
            image_width = core.get_vision_tower().num_patches
        before = (ids == IMAGE_TOKEN_INDEX).long().cumsum(dim=1)
        position = torch.arange(ids.shape[1], device=ids.device) + before * (image_width - 1)
        limit = getattr(core.config, "tokenizer_model_max_length", None) or torch.iinfo(torch.long).max
        return ((labels != IGNORE_INDEX) & (position > 0) & (position < limit)).sum(dim=1).tolist()

    def _watch_answers(self, tokens: list[int]) -> None:
        """Announce the first sample whose answers are all cut off: its loss is a zero that nobody sees in the mean."""
        cut = tokens.count(0)
        if cut and not self._cut_samples:
            logger.warning(
                "--model_max_length %s leaves no answer to learn from in %d of the %d samples of step %d: raise it, "
                "or shorten such samples. The end of training tells how many there were.",
                getattr(llava_core(self.model).config, "tokenizer_model_max_length", None),
                cut,
                len(tokens),
                self.state.global_step + 1,
            )
        self._cut_samples += cut
        self._seen_samples += len(tokens)

    def _report_cut_samples(self) -> None:
        totals = torch.tensor([self._cut_samples, self._seen_samples], dtype=torch.float32, device=self.args.device)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, "sum")
        cut, seen = (int(total) for total in totals.tolist())
        if cut and self.is_world_process_zero():
            logger.warning(
                "--model_max_length %s left no answer to learn from in %d of the %d samples of this run.",
                getattr(llava_core(self.model).config, "tokenizer_model_max_length", None),
                cut,
                seen,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Logging
    # -----------------------------------------------------------------------------------------------------------------
    def _remember(self, sums: LossSums, counts: Counts) -> None:
        if self._unlogged is None:
            self._logged_step = self.state.global_step
        values = (
            sums.lm / counts.answer_tokens,
            None if sums.kl is None else sums.kl / counts.answer_tokens,
            None if sums.attention is None else sums.attention / counts.image_samples,
            sums.similarity,
            sums.samples,
        )
        row = torch.stack([torch.zeros_like(sums.lm) if value is None else value for value in values]).detach().float()
        self._unlogged = row if self._unlogged is None else self._unlogged + row

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the terms, unweighted: each the mean over the optimizer steps since the last log, over ranks; the
        similarity over the samples with an image, left out where there was none."""
        if "loss" in logs and self._unlogged is not None:
            steps = max(1, self.state.global_step - self._logged_step)
            totals = self._unlogged
            if self.accelerator.num_processes > 1:
                totals = self.accelerator.reduce(totals, "sum")
            lm, kl, attention, similarity, samples = totals.tolist()
            terms = {"lm": lm / steps}
            if self.objective.teacher is not None:
                terms["kl"] = kl / steps
            if self.args.aligns_attention:
                terms["attention"] = attention / steps
            if samples:
                terms["attention_similarity"] = similarity / samples
            logs.update({name: round(value, 6) for name, value in terms.items()})
            self._unlogged = None
        super().log(logs, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # Data order
    # -----------------------------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
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

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._move_teacher()
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            path = os.path.join(resume_from_checkpoint, "trainer_state.json")
            state = transformers.TrainerState.load_from_json(path)
            if 0 < self.args.max_steps <= state.global_step:
                # Resumed at its end, transformers would make one step too many.
                logger.info("%s is this run's last step: nothing is left to train.", resume_from_checkpoint)
                self.state = state
                return self._load_from_checkpoint(resume_from_checkpoint)
        if self.objective.needs_calibration:
            self._calibrate()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._report_cut_samples()
        return result

    def _calibrate(self) -> None:
        """Measure layer distances for adaptive matching on the first batches of the data, the same on every rank."""
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ValueError(
                "--layer_matching adaptive runs the student before ZeRO-3 can gather it: use ZeRO-2, or another "
                "matching."
            )
        size = self.args.per_device_train_batch_size
        batches = []
        for start in range(0, min(len(self.train_dataset), size * self.args.calibration_batches), size):
            stop = min(start + size, len(self.train_dataset))
            samples = self.data_collator([self.train_dataset[index] for index in range(start, stop)])
            batches.append({**self._prepare_inputs(samples), "use_cache": False})
        self.objective.student.to(self.args.device)
        dtype = compute_dtype(self.args)
        # Nothing has wrapped the models for mixed precision yet.
        with torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype != torch.float32):
            self.objective.calibrate(batches)

    def _move_teacher(self) -> None:
        if self.objective.teacher is not None:
            self.objective.teacher.to(self.args.device)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # -----------------------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model, trial, *args, **kwargs):
        # Not LLaVATrainer's: it saves an adapter without the state that resuming needs.
        return transformers.Trainer._save_checkpoint(self, model, trial, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._adapter = checkpoint.adapter_weights(self.model)  # on every rank; what follows runs on one
        super().save_model(output_dir, _internal_call)
        self._adapter = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            checkpoint.save(self.model, output_dir, self.args, self.tokenizer_to_save, state_dict, self._adapter)

    def _load_rng_state(self, checkpoint):
        with compat.reads_own_rng_state():
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint.load_into(self.model if model is None else model, resume_from_checkpoint)
