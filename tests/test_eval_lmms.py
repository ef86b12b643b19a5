"""lmms-eval asks a checkpoint of ours, on a task made of the miniature's questions. Needs lmms-eval, whose pins are
newer than LLaVA's: pip install lmms_eval."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from miniature import weights

pytest.importorskip("lmms_eval.models", reason="lmms-eval is not installed")
pytestmark = pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
task: "miniature_{kind}"
test_split: test
output_type: {output}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: !function utils.target
{options}
metadata:
  - version: 1.0
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"])]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]


def target(doc):
    return doc["answer"]


def results(doc, found):
    return {"exact": float(found[0] == doc["answer"])}


def mean(values):
    return sum(values) / len(values)
"""
GENERATE = """
generation_kwargs:
  max_new_tokens: 4
  until: ["."]
process_results: !function utils.results
metric_list:
  - metric: exact
    aggregation: !function utils.mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms")
    lines = (world["data"] / "relation_val.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    for question in questions:
        question["image"] = str(world["data"] / "images" / question["image"])
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (root / "tasks").mkdir()
    (root / "tasks" / "utils.py").write_text(UTILS)
    task = TASK.format(questions=path, kind="relation", output="generate_until", options=GENERATE)
    (root / "tasks" / "relation.yaml").write_text(task)
    weights.install(root / "models")
    return root


@pytest.fixture(scope="module")
def model(place):
    from llava_compodistill.eval.lmms import LlavaCompoDistill

    teacher = str(place / "models" / "llava-teacher")
    return LlavaCompoDistill(teacher, conv_template="qwen_qa", batch_size="8", device="cpu")


def test_a_task_of_lmms_eval(place, model, monkeypatch):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(place / "hub"))
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = evaluator.simple_evaluate(model, tasks=["miniature_relation"], task_manager=manager, bootstrap_iters=0)
    value = next(v for k, v in found["results"]["miniature_relation"].items() if k.startswith("exact,"))
    assert value > 0.8  # the teacher sees


class Instance:
    def __init__(self, *args):
        self.args = args


def test_likelihoods_and_what_it_does_not_do(place, model):
    questions = [json.loads(line) for line in (place / "questions.jsonl").read_text().splitlines()]
    model.task_dict = {"t": {"test": questions}}

    def visual(doc):
        from PIL import Image

        return [Image.open(doc["image"])]

    asked = [Instance(q["text"], answer, visual, n, "t", "test")
             for n, q in enumerate(questions[:8]) for answer in ("Yes", "No")]  # fmt: skip
    found = model.loglikelihood(asked)
    # Losses: lmms-eval takes the smallest.
    picked = [("Yes", "No")[found[2 * n + 1][0] < found[2 * n][0]] for n in range(8)]
    assert sum(p == q["answer"] for p, q in zip(picked, questions, strict=False)) >= 7
    assert all(value > 0 for value, _ in found)
    # What is decoded greedily is what is likelier.
    assert all(greedy == (value == min(found[n - n % 2][0], found[n - n % 2 + 1][0]))
               for n, (value, greedy) in enumerate(found))  # fmt: skip
    two = Instance("<image>\nx", {"max_new_tokens": 2}, lambda doc: visual(doc) * 2, 0, "t", "test")
    with pytest.raises(ValueError, match="t/test/0: llava_compodistill reads one image a question, this has 2"):
        model.generate_until([two])
    cut = Instance(questions[0]["text"], {"until": ["e", "o"], "temperature": 0.7}, visual, 0, "t", "test")
    assert model.generate_until([cut]) in (["Y"], ["N"])
    with pytest.raises(NotImplementedError, match="single questions"):
        model.generate_until_multi_round([two])


def test_lmms_eval_finds_the_model_by_its_entry_point():
    if not importlib.metadata.packages_distributions().get("llava_compodistill"):
        pytest.skip("llava-compodistill runs from its sources")
    from lmms_eval.models import MODEL_REGISTRY_V2

    assert MODEL_REGISTRY_V2.get_model_class("llava_compodistill").__name__ == "LlavaCompoDistill"
