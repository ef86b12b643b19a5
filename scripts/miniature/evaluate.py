"""Evaluation on the miniature world's held-out sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from llava_compodistill.eval.scoring import Question, Score, score

from .compositional import KINDS
from .language import CAPTION_PROMPT
from .settings import VERSION

#: The types that need a relation between objects; the others can be answered from the set of objects (the notes'
#: pitfall: 80 % overall is chance on relations).
RELATION_KINDS = ("swap_obj", "replace_rel")


def load_for_evaluation(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint, through the plugin's loader, ready for `eval.scoring`."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    from llava_compodistill.hosts.llava import import_llava, register
    from llava_compodistill.hosts.llava.templates import prepare_tokenizer, use_template

    register(train=True)
    loader = import_llava("llava.model.builder").load_pretrained_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model, _, _ = loader(str(path), None, path.name, device=device, torch_dtype=torch.float32)
    prepare_tokenizer(tokenizer, use_template(VERSION))
    return model.eval(), tokenizer


@dataclass
class Scores:
    """Accuracies in [0, 1].

    Attributes:
        recognition: exact greedy answers to colour, shape, size and count questions.
        relation: exact greedy answers to yes/no questions on relations (chance 0.5).
        compositional: by type, share of pairs whose true caption is likelier than the false one (chance 0.5).
        unseen: the same for attribute-object combinations that training never showed.
    """

    recognition: float
    relation: float
    compositional: dict[str, float] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)

    @property
    def compositional_mean(self) -> float:
        return mean(self.compositional.values())

    @property
    def relation_types(self) -> float:
        return mean(self.compositional[kind] for kind in RELATION_KINDS)

    @property
    def unseen_mean(self) -> float:
        return mean(self.unseen.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "compositional_mean": self.compositional_mean,
            "relation_types": self.relation_types,
            "unseen_mean": self.unseen_mean,
        }


def read_questions(path: Path, images: Path) -> list[Question]:
    """Read a question file (JSON lines with image, text, answer)."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(str(images / record["image"]), record["text"], record["answer"]) for record in records]


def read_captions(data: str | Path, split: str, kinds: Sequence[str] = KINDS) -> list[Question]:
    """The true captions of the compositional set, as answers to the caption prompt."""
    data = Path(data)
    return [
        Question(str(data / "images" / item["filename"]), CAPTION_PROMPT, item["caption"])
        for kind in kinds
        for item in json.loads((data / f"compositional_{split}" / f"{kind}.json").read_text(encoding="utf-8")).values()
    ]


def evaluate(
    model: nn.Module, tokenizer: Any, data: str | Path, split: str = "val", batch_size: int = 64, **options: Any
) -> Scores:
    """Evaluate a model on a split of the held-out sets.

    Args:
        model: a LLaVA model in eval mode with its tower loaded.
        data: the folder that `write_dataset` filled.
        split: val, on which settings are chosen, or test, which is reported.
        options: go to `score`.
    """
    data = Path(data)
    images = data / "images"

    def scored(questions: Sequence[Question]) -> list[Score]:
        return score(questions, model, tokenizer, version=VERSION, batch_size=batch_size, **options)

    return Scores(
        recognition=_exact(scored, read_questions(data / f"recognition_{split}.jsonl", images)),
        relation=_exact(scored, read_questions(data / f"relation_{split}.jsonl", images)),
        compositional=_compositional(scored, data / f"compositional_{split}", images),
        unseen=_compositional(scored, data / f"compositional_{split}_unseen", images),
    )


def relation_types(model: nn.Module, tokenizer: Any, data: str | Path, split: str = "val") -> float:
    """The mean accuracy over `RELATION_KINDS`, in [0, 1]."""

    def scored(questions: Sequence[Question]) -> list[Score]:
        return score(questions, model, tokenizer, version=VERSION, batch_size=64)

    data = Path(data)
    return mean(_compositional(scored, data / f"compositional_{split}", data / "images", RELATION_KINDS).values())


Scorer = Callable[[Sequence[Question]], list[Score]]


def _exact(scored: Scorer, questions: Sequence[Question]) -> float:
    return mean(result.greedy for result in scored(questions))


def _compositional(scored: Scorer, folder: Path, images: Path, kinds: Sequence[str] = KINDS) -> dict[str, float]:
    accuracy = {}
    for kind in kinds:
        items = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8")).values()
        questions = [
            Question(str(images / item["filename"]), CAPTION_PROMPT, item[key])
            for item in items
            for key in ("caption", "negative_caption")
        ]
        scores = [result.log_probability for result in scored(questions)]
        accuracy[kind] = mean(true > false for true, false in zip(scores[::2], scores[1::2], strict=True))
    return accuracy
