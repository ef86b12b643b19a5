"""Does the loss still depend on the image? A run whose image has ceased to matter trains on, and its loss looks well.

Every few hundred steps the loss of a few samples is measured with their own images and with each other's. What the
wrong image costs, in nats an answer token, is logged as `sight`; the cost is two forwards of a few samples, below 1 %
of a run (`scripts/benchmark/run.py --suite sight`).
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import transformers

from ..errors import BlindError
from ..pair.tokens import TEACHER
from ..record.costs import answer_costs
from . import facts
from .samplers import samples_of

logger = logging.getLogger(__name__)

#: Nats an answer token: a model that sees pays more than this for another's image, by far.
BLIND_BELOW = 0.01
#: A new adapter needs some steps before the language model reads it.
JUDGED_FROM = 0.2
#: A run shorter than this is not measured at its end.
SHORTEST_RUN = 50
#: Steps between two measurements.
STEPS = 200
#: Samples a step with which the default 16 samples take 1 % of `STEPS` steps of PT, which does least in a step.
_CHEAP_FROM = 10


class SightGuard(transformers.TrainerCallback):
    """Measures `sight` every `--sight_steps` steps and at the end, and says so when there is none (`--blind`).

    Args:
        trainer: a CompoDistillTrainer over a data set that knows which samples have an image.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.value: float | None = None
        self._batches: list[tuple[dict[str, Any], dict[str, Any]]] | None = None

    def take(self) -> float | None:
        """The newest measurement, once."""
        value, self.value = self.value, None
        return value

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps >= SHORTEST_RUN
        if not last and state.global_step % (args.sight_steps or steps_between(args)):
            return
        costs = self.measure()
        if len(costs) < 2:
            return
        self.value = sum(costs) / len(costs)
        spread = math.sqrt(sum((cost - self.value) ** 2 for cost in costs) / (len(costs) - 1))
        highest = self.value + 2 * spread / math.sqrt(len(costs))
        if state.global_step >= JUDGED_FROM * state.max_steps and highest < BLIND_BELOW:
            self._report(state.global_step, highest, len(costs), args)

    def _report(self, step: int, highest: float, samples: int, args: Any) -> None:
        message = (
            f"Step {step}: the image has no influence on the loss. Given another sample's image, the answers of "
            f"{samples} samples cost at most {highest:.4f} nats a token more (95 %). Possible causes: an adapter that "
            "was not loaded or does not learn (--pretrain_mm_mlp_adapter, --mm_projector_lr), a conversation template "
            "that the data does not fit (--version), answers that the text alone gives away."
        )
        if args.blind == "error":
            raise BlindError(f"{message} --blind warn goes on in spite of it. Checkpoints are untouched.")
        logger.error(message)

    # -----------------------------------------------------------------------------------------------------------------
    # Measuring
    # -----------------------------------------------------------------------------------------------------------------
    def measure(self) -> list[float]:
        """For each of the samples on all ranks, what another's image costs in nats an answer token.

        Every rank calls this; each runs the samples of its own share.
        """
        trainer = self.trainer
        if self._batches is None:
            self._batches = self._make_batches()
        model = trainer.model_wrapped
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                found = [self._costs(model, own) for own, _ in self._batches]
                other = [self._costs(model, others) for _, others in self._batches]
        finally:
            model.train(training)
        if not found:
            return []
        own, other = torch.cat(found), torch.cat(other)
        # [samples, 2]: the difference of the sums, and the number of answer tokens.
        costs = torch.stack([other[:, 0] - own[:, 0], own[:, 1]], dim=1)
        if trainer.accelerator.num_processes > 1:
            costs = trainer.accelerator.gather(costs)
        return [difference / count for difference, count in costs.tolist() if count]

    def _costs(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """[B, 2]: L_LM summed over the answer tokens of each sample, and their number."""
        return answer_costs(model, self.trainer._prepare_inputs(batch))[0]

    def _make_batches(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """This rank's share of the samples, as batches with their own images and with each other's."""
        args, dataset = self.trainer.args, samples_of(self.trainer.train_dataset)
        if any(hasattr(parameter, "ds_id") for parameter in self.trainer.model.parameters()):
            # A forward without a backward makes DeepSpeed trace its modules anew, and the next step fails where ranks
            # hold batches of unlike kinds (RuntimeError: Detected a disagreement on list length).
            logger.info("--blind: sight is not measured under ZeRO-3.")
            return []
        share = max(2, math.ceil(args.sight_samples / args.world_size))
        chosen = with_different_images(dataset.list_data_dict, share * args.world_size, args.seed)
        if len(chosen) < 2 * args.world_size:
            logger.info("--blind: the data has too few samples with an image of their own; sight is not measured.")
            return []
        share = min(share, len(chosen) // args.world_size)
        mine = chosen[args.process_index * share : (args.process_index + 1) * share]
        samples = [dataset[index] for index in mine]
        samples = [sample.get("chosen", sample) for sample in samples]  # of a pair of answers
        images = [sample["image"] for sample in samples]
        others = [{**sample, "image": images[place - 1]} for place, sample in enumerate(samples)]
        size = args.per_device_train_batch_size
        return [
            (self._collate(samples[start : start + size]), self._collate(others[start : start + size]))
            for start in range(0, len(samples), size)
        ]

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.trainer.data_collator(samples)
        return {name: value for name, value in batch.items() if name not in (facts.KEY, TEACHER)}


def steps_between(args: Any) -> int:
    """Steps from one measurement to the next: `STEPS`, or more where small steps would make it cost above 1 %."""
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    samples = max(args.sight_samples, 2 * args.world_size)
    return max(STEPS, math.ceil(STEPS * _CHEAP_FROM * samples / (16 * step)))


def can_measure(dataset: Any) -> bool:
    """Whether a data set says which of its samples have an image (this package's does)."""
    return hasattr(getattr(dataset, "list_data_dict", None), "with_image")


def with_different_images(records: Any, wanted: int, seed: int) -> list[int]:
    """Up to `wanted` samples, drawn by the seed, no two with the same image."""
    chosen: dict[str, int] = {}
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if len(chosen) == wanted:
            break
        if records.with_image[index]:
            chosen.setdefault(records[index]["image"], index)
    return list(chosen.values())
