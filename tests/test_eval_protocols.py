"""How the benchmarks are asked and scored, without a model: an oracle in its place, the prompts, the tables."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
from rich.console import Console

from llava_compodistill.errors import DataError, RecordsError
from llava_compodistill.eval import protocols
from llava_compodistill.eval.benchmarks import get, llava, mme, pope, registered
from llava_compodistill.eval.benchmarks.base import EngineBenchmark, Item
from llava_compodistill.eval.requests import Answer, FirstWord, Likelihood
from llava_compodistill.eval.run import Run
from llava_compodistill.eval.summaries import show, table
from miniature.benchmarks import write_benchmarks


# ---------------------------------------------------------------------------------------------------------------------
# The whole way from files to figures, with models that know the answers, or their opposites, or nothing
# ---------------------------------------------------------------------------------------------------------------------
class Oracle:
    """Stands for the engine: answers each request by `decide(truth, options)`, one of two options.

    Args:
        items: what will be asked, with its labels.
    """

    def __init__(self, items, decide):
        self.items, self.decide = items, decide
        self.true = {(item.images[n], caption) for item in items for n, caption in enumerate(item.captions[:2])
                     if n < len(item.images)}  # fmt: skip
        self.labels = {(item.images[0], item.prompt): item.fields.get("label") for item in items if item.prompt}

    def expecting(self, images):
        return contextlib.nullcontext()

    def run(self, requests, keep_going):
        return [self.answer(request) for request in requests]

    def holds(self, image, caption):
        return self.decide((image, caption) in self.true, [True, False])

    def answer(self, request):
        if isinstance(request, Likelihood):
            return -1.0 if self.holds(request.image, request.answer) else -2.0
        if isinstance(request, FirstWord) and request.words == ("Yes", "No"):
            caption = request.prompt.split('"')[1]
            return [-0.1, -2.0] if self.holds(request.image, caption) else [-2.0, -0.1]
        if (request.image, request.prompt) in self.labels:
            label = self.labels[request.image, request.prompt]
            wrong = {"yes": "No", "no": "Yes", "A": "B", "B": "A"}.get(label, "nonsense")
            return self.decide(label, [label, wrong])
        options = [line.strip()[4:] for line in request.prompt.splitlines()[1:3]]
        true = next(number for number, caption in enumerate(options) if (request.image, caption) in self.true)
        picked = self.decide(true, [0, 1])
        return "AB"[picked] if isinstance(request, Answer) else [-float(picked == 1), -float(picked == 0)]


def run_oracle(world, tmp_path, name, protocol, decide):
    write_benchmarks(world["data"], tmp_path / "data")
    benchmark = get(name)
    items = benchmark.load(tmp_path / "data")
    run = Run(benchmark, items, {"model": "oracle", "template": "qwen_qa"}, tmp_path / "out", protocol)
    run.ask(Oracle(items, decide), run.begin(), run.path)
    return run.finish()


def always_right(truth, options):
    return truth


def always_wrong(truth, options):
    return next(option for option in options if option != truth)


WAYS = [
    (name, protocol) for name, benchmark in registered(EngineBenchmark).items() for protocol in benchmark.protocols
]


@pytest.mark.parametrize(("name", "protocol"), WAYS)
def test_perfect_answers_give_100_and_inverted_ones_0(world, tmp_path, name, protocol):
    assert run_oracle(world, tmp_path / "right", name, protocol, always_right)["value"] == 100
    assert run_oracle(world, tmp_path / "wrong", name, protocol, always_wrong)["value"] == 0


@pytest.mark.parametrize("protocol", protocols.CHOOSING)
def test_coin_flips_give_chance(world, tmp_path, protocol):
    rng = random.Random(0)
    values = [
        run_oracle(world, tmp_path / str(n), "sugarcrepe", protocol, lambda truth, options: rng.choice(options))
        for n in range(40)
    ]
    assert np.mean([summary["value"] for summary in values]) == pytest.approx(50, abs=4)


# ---------------------------------------------------------------------------------------------------------------------
# Protocols, without a model
# ---------------------------------------------------------------------------------------------------------------------
SQUARE = Item("7", ("a.png", "b.png"), ("red left of blue", "blue left of red"), fields={"type": "swap"})


def test_likelihood_makes_a_matrix_of_captions_and_images():
    asked = protocols.requests(SQUARE, "likelihood", "Caption:")
    assert asked[1] == Likelihood("b.png", "Caption:", SQUARE.captions[0])
    assert asked[2] == Likelihood("a.png", "Caption:", SQUARE.captions[1])
    made = protocols.record(SQUARE, "likelihood", [1, 2, 3, 4])
    assert made["scores"] == [[1, 2], [3, 4]] and made["type"] == "swap" and made["id"] == "7"


def test_yes_asks_whether_the_figure_shows_it():
    asked = protocols.requests(SQUARE, "yes")
    assert asked[0] == FirstWord(
        "a.png", 'Does this figure show "red left of blue"? Please answer yes or no.', ("Yes", "No")
    )
    made = protocols.record(SQUARE, "yes", [[-1, -2], [-3, -4], [-5, -6], [-7, -8]])
    assert made["scores"] == [[-1, -3], [-5, -7]]


def test_choice_asks_in_both_orders_with_the_authors_wording():
    item = Item("3", ("a.png",), ("A dog", "A cat"), fields={"subset": "replace_obj"})
    first, second = protocols.requests(item, "choice")
    assert isinstance(first, Answer) and first.prompt == (
        "Which caption best describes the image?\n(A) A dog\n (B) A cat\n"
        "Answer with the option's alphabet from the given choices directly."
    )
    assert "(A) A cat\n (B) A dog" in second.prompt
    made = protocols.record(item, "choice", ["(B) A cat", "neither"])
    assert [choice["picked"] for choice in made["choices"]] == [1, None]
    assert made["choices"][0]["text"] == "(B) A cat"
    made = protocols.record(item, "choice-logits", [[-1.0, -2.0], [-1.5, -1.5]])
    assert [choice["picked"] for choice in made["choices"]] == [0, None]  # a tie is no choice


def test_protocols_that_do_not_fit_are_refused():
    many = Item("1", ("a.png",), ("x", "y", "z"))
    with pytest.raises(ValueError, match="3 captions, letters choose between two"):
        protocols.requests(many, "choice")
    with pytest.raises(ValueError, match="protocol 'guess': must be one of"):
        protocols.requests(many, "guess")


# ---------------------------------------------------------------------------------------------------------------------
# What LLaVA's and the official scorers print, and the table
# ---------------------------------------------------------------------------------------------------------------------
def test_printed_scores_are_read():
    printed = "Category: random, # samples: 4\nAccuracy: 0.75\nF1 score: 0.8\nYes ratio: 0.5\n===\n"
    printed += "Category: popular, # samples: 4\nAccuracy: 0.25\nF1 score: 0.4\nYes ratio: 0.5\n"
    found = pope.read_printed(printed)
    assert found["f1"] == pytest.approx(60) and found["accuracy"] == 50 and found["f1_random"] == 80
    assert llava.read_accuracy("Binary: 70.1%\nAccuracy: 61.90%\n") == {"accuracy": 61.9}
    printed = "=========== Perception ===========\ntotal score: 1510.5\n=== Cognition ===\ntotal score: 320.0\n"
    assert mme.read_printed(printed) == {"perception": 1510.5, "cognition": 320, "percent": pytest.approx(75.525)}
    assert mme.read_printed("") == pope.read_printed("") == llava.read_accuracy("") == {}


def test_averages_are_the_papers_or_not_there():
    def summary(name, value):
        benchmark = get(name)
        paper = benchmark.paper_figures(getattr(benchmark, "protocols", ("LLaVA's",))[0])
        return {"benchmark": name, "headline": "x", "protocol": "y", "value": value, "paper": paper, "figures": {}}

    def printed(names, value=50.0):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(table([summary(name, value) for name in names], "model"))
        return {line.split("  ")[0].strip(): line.split() for line in console.export_text().splitlines()}

    reasoning = ["sugarcrepe", "sade", "bivlc", "winoground"]
    answering = ["vqav2", "gqa", "vizwiz", "textvqa", "mme"]
    rows = printed([*reasoning, *answering, "pope"])
    # As the paper prints them: 62.6, 54.9, 61.9 (62.0 of its rounded figures) and 70.3, 60.7, 66.7
    assert rows["VQA average"][-4:] == ["50.0", "62.6", "54.9", "62.0"]
    assert rows["CR average"][-4:] == ["50.0", "70.3?", "60.7?", "66.7?"]
    part = [summary(name, 50.0) | {"figures": {"missing": ["x"]}, "note": "said below"} for name in reasoning]
    console = Console(width=100, record=True, file=io.StringIO())
    show(part, "model", console)
    text = console.export_text()
    assert "CR average" not in text and "x (part)" in text and "SADE: said below" in text
    assert "CR average" not in printed(reasoning[:3]) and "VQA average" not in printed(answering, None)


def test_a_slow_rate_is_not_zero_a_second():
    from llava_compodistill.eval.cli import _rate

    assert _rate(300, 60) == "5.0 a second" and _rate(2, 60) == "30.0 s each"


def test_many_items_in_a_row_that_cannot_be_asked_end_a_benchmark(world, tmp_path):
    """A few may be broken; all of them are a fault of something else."""

    class Broken(Oracle):
        def run(self, requests, keep_going):
            return [DataError("no image")] * len(requests)

    write_benchmarks(world["data"], tmp_path / "data")
    items = get("sugarcrepe").load(tmp_path / "data")
    run = Run(get("sugarcrepe"), items, {"model": "broken", "template": "qwen_qa"}, tmp_path / "out")
    engine = Broken(items, None)
    assert len(run.ask(engine, items[:4], run.path)) == 4
    with pytest.raises(RecordsError, match="None of 8 items in a row can be asked: .*no image"):
        run.ask(engine, items, run.path)
