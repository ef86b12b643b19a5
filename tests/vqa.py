"""Asking questions through LLaVA's model_vqa_loader and through the engine in its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import factory
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llava_compodistill.eval.as_llava import AsLlava
from llava_compodistill.eval.vqa_loader import main
from llava_compodistill.hosts.llava import register, runner

PROMPTS = [
    "What is this?",
    "Is the red circle left of the blue square?\nAnswer the question using a single word or phrase.",
    " two  spaces and a line\n",
]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, entries: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def flags(model: Path, questions: Path, images: Path, answers: Path, template: str, longest: int = 6) -> list[str]:
    """What scripts/eval/common.sh gives to either module."""
    paths = {"--model-path": model, "--question-file": questions, "--image-folder": images, "--answers-file": answers}
    values = {"--num-chunks": 1, "--chunk-idx": 0, "--temperature": 0, "--max_new_tokens": longest}
    return [str(part) for pair in {**paths, **values, "--conv-mode": template}.items() for part in pair]


class _WithoutWorkers(DataLoader):
    """LLaVA's module wants four, which take long to start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "num_workers": 0})


def asked_through_llava(arguments: list[str], family: str = "qwen2") -> list[list[int]]:
    """Run LLaVA's module; the tokens of each answer, in the order of the questions."""
    register()
    from llava_compodistill.hosts.llava.language_models import model_class

    cls, found = model_class(family), []
    generate = cls.generate

    def spying(self, *args, **kwargs):
        tokens = generate(self, *args, **kwargs)
        found.append(tokens[0].tolist())
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "generate", spying)
        patch.setattr("torch.utils.data.DataLoader", _WithoutWorkers)
        for layer in (torch.nn.Linear, torch.nn.LayerNorm):  # the module switches these off, and for good
            patch.setattr(layer, "reset_parameters", layer.reset_parameters)
        runner.run("llava.eval.model_vqa_loader", arguments)
    return found


def asked_through_engine(arguments: list[str]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    answer_tokens = AsLlava._answer_tokens

    def spying(self, rows, caches):
        answers = answer_tokens(self, rows, caches)
        found.update((row.index, tokens) for row, tokens in zip(rows, answers, strict=True))
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsLlava, "_answer_tokens", spying)
        assert main(arguments) == 0
    return [found[number] for number in range(len(found))]


def assert_same_answers(first: Path, second: Path) -> list[dict]:
    """All that a line says but its own id."""
    answers = read(first), read(second)
    for mine in answers:
        assert len({entry.pop("answer_id") for entry in mine}) == len(mine)
    assert answers[0] == answers[1]
    return answers[0]


#: What makes the answers of a random model depend on the question, and not on its biases and a few keys alone.
TALKATIVE = {
    "embed_tokens.weight": 20,
    "o_proj.weight": 10,
    "down_proj.weight": 10,
    "q_proj.weight": 0.2,
    "k_proj.weight": 0.2,
    "v_proj.weight": 5,
    "bias": 0.03,
}


def make_questions(root: Path) -> SimpleNamespace:
    """Three images of different sizes; questions of every kind on each, in no order, some of them twice."""
    for number, (size, color) in enumerate([((60, 60), "red"), ((90, 31), "blue"), ((24, 170), "green")]):
        image = Image.new("RGB", size, color)
        image.paste("white", (number * 5, 4, 18 + number, 20))
        image.save(root / f"{number}.png")
    texts = [*PROMPTS, "How many objects do you see, and which of them is the largest one?", PROMPTS[0]]
    asked = [{"question_id": n, "image": f"{n % 3}.png", "text": texts[n % 5]} for n in range(17)]
    return SimpleNamespace(images=root, path=write(root / "questions.jsonl", asked), asked=asked)


def model_folder(tower: Path, tokenizer: Path, path: Path, *, family: str = "qwen2", **values) -> Path:
    """A random checkpoint; `generation` are the entries of its generation_config.json."""
    generation = values.pop("generation", {})
    size = len(AutoTokenizer.from_pretrained(str(tokenizer), use_fast=False))
    more = {"mm_use_im_start_end": False, "image_aspect_ratio": "pad", **values}
    model = factory.make_model(tower, family, vocab=size + 5, dtype=torch.float32, seed=3, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            factors = [factor for ending, factor in TALKATIVE.items() if name.endswith(ending)]
            parameter *= factors[0] if factors and not re.search("vision|projector", name) else 1
        # Rows without a token (two may be the markers'), which must never be answered.
        model.get_output_embeddings().weight[size + 2 :] *= 50
    if more["image_aspect_ratio"] == "anyres":
        model.get_model().image_newline = torch.nn.Parameter(torch.randn(model.config.hidden_size))
    for name, value in {"eos_token_id": None, **generation}.items():
        setattr(model.generation_config, name, value)
    return factory.checkpoint_folder(path, model, tokenizer)


def both(model: Path, questions: SimpleNamespace, template: str, longest: int = 9, family: str = "qwen2"):
    """The tokens of all answers, which are the same for both."""
    paths = [model.parent / f"{way}.jsonl" for way in ("llava", "engine")]
    arguments = [flags(model, questions.path, questions.images, path, template, longest) for path in paths]
    theirs, mine = (
        asked_through_llava(arguments[0], family),
        asked_through_engine([*arguments[1], "--batch-size", "4"]),
    )
    if family != "qwen2":  # transformers 4.37 puts a BOS token before what a Llama model says
        theirs = [tokens[1:] if tokens[:1] == [1] and len(tokens) > len(own) else tokens
                  for tokens, own in zip(theirs, mine, strict=True)]  # fmt: skip
    assert mine == theirs
    assert_same_answers(*paths)
    assert len({tuple(tokens) for tokens in mine}) > 2
    return mine
