"""Score given answers: how likely a model finds them, and whether it would have said them.

One forward per question gives both: the log-probability of the answer's tokens, and whether greedy decoding produces
exactly this answer (the likeliest token is the answer's at every position, the end token included).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..hosts.llava.host import import_llava, import_llava_train
from ..hosts.llava.model import llava_core
from ..hosts.llava.templates import prepare_tokenizer, use_template
from ..record.merge import MergeRecorder, record_merge


@dataclass(frozen=True)
class Question:
    """An image file, what is asked about it (without <image>), and the answer to score."""

    image: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Scores of one answer.

    Attributes:
        log_probability: mean over the answer's tokens, in nats, the end token included.
        greedy: whether greedy decoding gives exactly this answer.
    """

    log_probability: float
    greedy: bool


class QuestionDataset(Dataset):
    """Questions as LLaVA's collator takes them: input_ids, labels and image."""

    def __init__(self, questions: Sequence[Question], tokenizer: Any, image_processor: Any, config: Any, version: str):
        self.questions = questions
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.version = version
        # Another template's padding token may be this one's end token, which the collator's mask would then hide.
        prepare_tokenizer(tokenizer, use_template(version))
        self._preprocess = import_llava_train().preprocess
        self._mm_utils = import_llava("llava.mm_utils")

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        from PIL import Image

        question = self.questions[index]
        use_template(self.version)
        turns = [
            {"from": "human", "value": f"<image>\n{question.prompt}"},
            {"from": "gpt", "value": question.answer},
        ]
        batch = self._preprocess([turns], self.tokenizer, has_image=True)
        with Image.open(question.image) as image:
            pixels = self._mm_utils.process_images([image.convert("RGB")], self.image_processor, self.config)[0]
        return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0], "image": pixels}


def batches(
    questions: Sequence[Question], model: nn.Module, tokenizer: Any, *, version: str, batch_size: int = 32
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches on the model's device, in the order of the questions."""
    core = llava_core(model)
    dataset = QuestionDataset(questions, tokenizer, core.get_vision_tower().image_processor, core.config, version)
    collator = import_llava_train().DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        yield {name: value.to(core.device) for name, value in batch.items()}


@torch.inference_mode()
def score(
    questions: Sequence[Question],
    model: nn.Module,
    tokenizer: Any,
    *,
    version: str = "qwen_1_5",
    batch_size: int = 64,
    progress: Iterable | None = None,
    inside: Callable[[MergeRecorder], contextlib.AbstractContextManager] | None = None,
) -> list[Score]:
    """Score answers in batches; the head runs at answer positions only, its log-softmax in fp32.

    Args:
        questions: what to score.
        model: a LLaVA model in eval mode, its vision tower loaded.
        tokenizer: with the padding and end token of training (`prepare_tokenizer`).
        version: conversation template.
        inside: makes the context that every forward runs in, for analyses that intervene in the model.

    Returns:
        One `Score` per question, in order.
    """
    core = llava_core(model)
    inside = inside or (lambda recorder: contextlib.nullcontext())
    scores: list[Score] = []
    for inputs in batches(questions, core, tokenizer, version=version, batch_size=batch_size):
        with record_merge(core) as recorder, _answer_logits(core, recorder) as collected, inside(recorder):
            core(**inputs, use_cache=False)
        logits, targets, sample = collected[-1]
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        per_row = log_probabilities.gather(1, targets[:, None])[:, 0]
        hit = logits.argmax(dim=-1) == targets
        for index in range(inputs["input_ids"].shape[0]):
            rows = sample == index
            scores.append(Score(float(per_row[rows].mean()), bool(hit[rows].all())))
        if progress is not None:
            progress.update(inputs["input_ids"].shape[0])
    return scores


@contextlib.contextmanager
def _answer_logits(model: nn.Module, recorder: MergeRecorder) -> Iterator[list]:
    """The forward inside the context runs the head at answer rows only; the list receives (logits[R, V], targets[R],
    sample[R])."""
    head = model.get_output_embeddings()
    run_head = head.forward
    collected: list = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        mask = recorder.batch.answer_mask()
        rows = hidden[mask]
        collected.append((run_head(rows), recorder.batch.answer_targets(), mask.nonzero()[:, 0]))
        return hidden.new_zeros(hidden.shape[0], 1, 1)

    head.forward = forward
    try:
        yield collected
    finally:
        del head.forward
