"""On-policy distillation: the student answers a share of the samples itself, and the teacher judges its answers.

Generating, a student comes to texts that are not in the data. There, too, it learns from the teacher's logits and maps
(GKD, Agarwal et al., arXiv 2306.13649, which trains on the student's outputs for a share lambda of the batches). Of a
sample that is drawn, the last answer is replaced by what the student generates at this step of its training. L_KL and
L_ADL run on it as on any answer. L_LM leaves it out: its labels are not the data's. The answers before it are the
data's and keep their losses.

What is drawn, and the random numbers that choose the tokens, depend on the seed, the optimizer step and the sample's
place in that step. So accumulation, the number of ranks and resuming change nothing, and the training's own random
state is left alone. The answers are made before the step's tokens are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from ..hosts.llava.decoding import continue_sequences
from ..hosts.llava.model import backbone, head, llava_core
from ..hosts.llava.training import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ..pair.student import computing
from . import facts
from .facts import OWN, BatchFacts, CountingCollator
from .on_policy import PARTITIONED, find_end_token
from .terms_log import TermsLog

if TYPE_CHECKING:
    from .arguments import TrainingArguments

logger = logging.getLogger(__name__)

#: Sequences that are generated at a time, in micro-batches: without gradients they take less memory.
_AT_ONCE = 4


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------
def draw(seed: int, step: int, place: int, count: int) -> tuple[float, torch.Tensor]:
    """The random numbers of one sample of a run, uniform in [0, 1): one that decides whether the student answers it,
    and [count], float64, that choose its tokens.

    Args:
        seed: of the run.
        step: optimizer steps made before.
        place: of the sample among those of the step, over all ranks.
    """
    digest = hashlib.blake2b(f"on-policy {seed} {step} {place}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    numbers = torch.rand(1 + count, generator=generator, dtype=torch.float64)
    return float(numbers[0]), numbers[1:]


def choose_tokens(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw a token for each of R rows of logits [R, V] with a uniform number each, [R]: the first token at which the
    sum of probabilities passes it. Temperature 0 is the likeliest token."""
    if temperature == 0:
        return logits.argmax(dim=1)
    sums = torch.softmax(logits.double() / temperature, dim=1).cumsum(dim=1)
    points = numbers.to(sums)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Answers in a window of micro-batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class _Sample:
    """A sample of a micro-batch whose last answer the student gives.

    Attributes:
        batch, row: where it is in the window.
        ids, labels: up to its last answer.
        tail: what follows the answer's end token.
        images: its own; empty where the batch has none.
        numbers: uniform, for its tokens.
        answer: what the student has said, with the end token if it has said that.
        complete: whether it has.
    """

    batch: int
    row: int
    ids: list[int]
    labels: list[int]
    tail: list[int]
    images: list[torch.Tensor]
    numbers: torch.Tensor
    answer: list[int] = field(default_factory=list)
    complete: bool = False

    def replaced(self) -> tuple[list[int], list[int]]:
        """ids and labels with the student's answer in place of the data's. One that has not come to its end token is
        cut there, as the length limit cuts any answer."""
        tail = self.tail if self.complete else []
        return self.ids + self.answer + tail, self.labels + self.answer + [IGNORE_INDEX] * len(tail)


class OwnAnswers:
    """Replaces the last answers of a share of the samples by the student's own.

    Args:
        student: wrapped or not.
        tokenizer: the student's, prepared for the template.
        collator: of the run, which collates the new texts and counts them.
        args: share, temperature, most tokens, seed and batch.
        limit: the length at which LLaVA cuts the merged sequence.

    Raises:
        ValueError: for a template without an end token, and for weights that are partitioned.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        collator: CountingCollator,
        args: TrainingArguments,
        limit: int | None,
    ):
        self.core, self.tokenizer, self.collator = llava_core(student), tokenizer, collator
        self.args, self.limit = args, limit
        self.end = find_end_token(tokenizer)
        if any(hasattr(parameter, "ds_id") for parameter in self.core.parameters()):
            raise ValueError(f"--on_policy {args.on_policy:g}: not with ZeRO-3, {PARTITIONED}")
        self._at_once = _AT_ONCE * args.per_device_train_batch_size
        self._seconds = self._all_seconds = 0.0
        self._since = self._begun = 0.0
        self._totals = [0, 0, 0]  # samples answered, all samples, tokens
        logger.info(
            "On-policy: the student gives the last answer of %g %% of the samples itself, at temperature %g and with "
            "at most %d tokens. L_LM leaves these answers out.",
            100 * args.on_policy,
            args.on_policy_temperature,
            args.on_policy_max_tokens,
        )

    def replace(
        self, window: Sequence[dict[str, Any]], step: int, prepare: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The micro-batches of an optimizer step, with answers of the student where they are drawn.

        Args:
            step: optimizer steps made before.
            prepare: brings a batch to the device, as the trainer does.

        Returns:
            As the collator gives them; those in which an answer is replaced hold OWN, see `facts`, and facts of their
            new texts.
        """
        begun = self._clock()
        if not self._totals[1]:
            self._since = self._begun = begun
        samples = [sample for number, batch in enumerate(window) for sample in self._drawn(batch, number, step)]
        samples.sort(key=lambda sample: len(sample.ids))  # so that little is padded
        with self._generating():
            start = 0
            while start < len(samples):
                start += self._answer_some(samples[start : start + self._at_once], prepare)
        answered = [sample for sample in samples if sample.answer]
        replaced = [
            self._rebuilt(batch, [sample for sample in answered if sample.batch == number])
            for number, batch in enumerate(window)
        ]
        self._totals[0] += len(answered)
        self._totals[1] += sum(len(batch["input_ids"]) for batch in window)
        self._totals[2] += sum(len(sample.answer) for sample in answered)
        self._seconds += self._clock() - begun
        return replaced

    def measure(self, found: Sequence[BatchFacts], step: int, log: TermsLog) -> None:
        """Log what share of a window's samples and of its answer tokens is the student's own."""
        shares = {"own_answers": ("own_samples", "samples"), "own_tokens": ("own_tokens", "answer_tokens")}
        for name, counts in shares.items():
            sums = [float(sum(getattr(batch, count) for batch in found)) for count in counts]
            log.measure(step, name, *torch.tensor(sums, device=self.args.device))

    # -----------------------------------------------------------------------------------------------------------------
    # Prompts
    # -----------------------------------------------------------------------------------------------------------------
    def _drawn(self, batch: dict[str, Any], number: int, step: int) -> list[_Sample]:
        """The samples of a micro-batch that the student answers."""
        args, count = self.args, self.args.on_policy_max_tokens
        most = args.per_device_train_batch_size * max(1, args.pack_length)  # samples of a micro-batch
        first = (number * args.world_size + args.process_index) * most
        draws = [draw(args.seed, step, first + row, count) for row in range(len(batch["input_ids"]))]
        images = _images_of_rows(batch)
        texts = _texts(batch)
        found = []
        for row, ((chance, numbers), (ids, labels)) in enumerate(zip(draws, texts, strict=True)):
            answer = _last_answer(labels)
            if chance < args.on_policy and answer is not None:
                start, stop = answer
                parts = ids[:start], labels[:start], ids[stop:]
                found.append(_Sample(number, row, *parts, images[row], numbers))
        return found

    def _rebuilt(self, batch: dict[str, Any], answered: list[_Sample]) -> dict[str, Any]:
        """A micro-batch with the answers of its samples, collated as any other."""
        if not answered:
            return batch
        texts = _texts(batch)
        own = torch.full((len(texts),), -1)
        for sample in answered:
            texts[sample.row] = sample.replaced()
            own[sample.row] = sum(label != IGNORE_INDEX for label in sample.labels[1:])
        collated = self.collator.collator(
            [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in texts]
        )
        batch = {**batch, **collated, OWN: own}
        return {**batch, facts.KEY: self.collator.facts(batch)}

    # -----------------------------------------------------------------------------------------------------------------
    # Generating
    # -----------------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Without gradients and dropout, in the precision of the step."""
        training = self.core.training
        self.core.eval()
        try:
            with torch.no_grad(), computing(self.args):
                yield
        finally:
            self.core.train(training)

    def _answer_some(self, samples: list[_Sample], prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
        """Let the student answer these samples, or none where the GPU's memory does not suffice: then there will be
        fewer at a time. Returns how many it has answered."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            self._answer(samples, prepare)
            return len(samples)
        # Outside of the handler, which holds on to the tensors of the failed call.
        torch.cuda.empty_cache()
        if len(samples) == 1:
            self._answer(samples, prepare)
            return 1
        self._at_once = len(samples) // 2
        logger.warning(
            "On-policy: out of GPU memory with %d answers at once, going on with %d.", len(samples), self._at_once
        )
        return 0

    def _answer(self, samples: list[_Sample], prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Let the student continue the samples' prompts."""
        core, args = self.core, self.args
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(sample.ids) for sample in samples],
            batch_first=True,
            padding_value=self.tokenizer.pad_token_id,
        )
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        batch = {"input_ids": ids, "mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        images = [image for sample in samples for image in sample.images]
        if images:
            alike = all(image.shape == images[0].shape for image in images)
            batch["images"] = torch.stack(images) if alike else images
        batch = prepare(batch)
        ids, mask = batch["input_ids"], batch["mask"]
        # Right-padded, as in training: no real token sees the padding behind it, so this forward needs no mask.
        _, _, mask, _, embeds, _ = core.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, None, batch.get("images")
        )
        embeds = backbone(core).embed_tokens(ids) if embeds is None else embeds
        outputs = backbone(core)(inputs_embeds=embeds, use_cache=True)
        lengths = mask.sum(dim=1)
        limits = torch.full_like(lengths, args.on_policy_max_tokens)
        if self.limit is not None:
            limits = limits.minimum(self.limit - lengths)
        numbers = torch.stack([sample.numbers for sample in samples]).to(ids.device)
        answers, complete = continue_sequences(
            core,
            outputs.last_hidden_state[torch.arange(len(samples), device=ids.device), lengths - 1],
            outputs.past_key_values,
            mask,
            lengths,
            lambda hidden, step: choose_tokens(self._logits(hidden), numbers[:, step], args.on_policy_temperature),
            [self.end],
            limits,
        )
        for sample, answer, whole in zip(samples, answers, complete, strict=True):
            sample.answer = [*answer, self.end] if whole else answer
            sample.complete = whole

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, V] of the tokens that the tokenizer has, float32. The one that pads is left out: the collator's mask
        would hide it."""
        logits = head(self.core)(hidden)[:, : len(self.tokenizer)].float()
        logits[:, self.tokenizer.pad_token_id] = -torch.inf
        return logits

    # -----------------------------------------------------------------------------------------------------------------
    # What it costs
    # -----------------------------------------------------------------------------------------------------------------
    def _clock(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)  # else what is queued before would count
        return time.perf_counter()

    def take_time(self, accelerator: Accelerator) -> float:
        """The share of the time since it was last asked that went into generating, on the rank where that is most: the
        others wait for it. Every rank calls it."""
        now = time.perf_counter()
        share = self._seconds / max(now - self._since, 1e-9)
        self._all_seconds += self._seconds
        self._since, self._seconds = now, 0.0
        return float(accelerator.gather(torch.tensor([share], device=self.args.device)).max())

    def report(self, accelerator: Accelerator) -> None:
        """Say once, at the end, how much was answered and what it has cost. Every rank calls it."""
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        mine = [*self._totals, (self._all_seconds + self._seconds) / elapsed]
        ranks = accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=self.args.device))
        answered, samples, tokens = (int(total) for total in ranks[:, :3].sum(dim=0).tolist())
        share = float(ranks[:, 3].max())
        logger.info(
            "On-policy: the student has answered %d of %d samples itself, with %.1f tokens each; generating took "
            "%.0f %% of the time.",
            answered,
            samples,
            tokens / max(answered, 1),
            100 * share,
        )


def _texts(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """ids and labels of each sample of a collated batch, without padding."""
    mask = batch["attention_mask"].bool().cpu()
    ids, labels = (batch[name].cpu() for name in ("input_ids", "labels"))
    return [(ids[row][real].tolist(), labels[row][real].tolist()) for row, real in enumerate(mask)]


def _images_of_rows(batch: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Each sample's images: one for each image token, and an empty one where there is none."""
    counts = (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()
    if batch.get("images") is None:
        return [[] for _ in counts]
    images = iter(batch["images"])
    return [[next(images) for _ in range(max(1, count))] for count in counts]


def _last_answer(labels: list[int]) -> tuple[int, int] | None:
    """Where the last answer begins and where it ends, behind its end token; None without any answer."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE_INDEX:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (start, stop) if start else None
