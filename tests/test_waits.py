"""Nothing in a micro-batch waits for the device: its forward and backward only queue work."""

from __future__ import annotations

import warnings

import pytest
import torch
from factory import make_batch, make_model
from waits import Waits

from llava_compodistill.hosts import base
from llava_compodistill.ops.visual_attention.key_lists import key_lists
from llava_compodistill.train import facts
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective
from llava_compodistill.train.trainer import CompoDistillTrainer

LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa", "qqIqaqaa"]  # two images, one, none, one behind a prompt
#: method -> options of a run.
METHODS = {
    "sft": {},
    "kd": {},
    "compodistill": {},
    "compodistill-weighed": {"visual_advantage": "both"},
    "compodistill-shuffled": {"shuffle_attention_targets": True},
    "release": {},
    "llava_kd": {},
    "align_kd": {},
    "llavadi": {},
}
#: What is left. The pass on the text alone has padding and no image, so that its mask stays, and transformers looks
#: whether it hides anything.
LEFT = {"compodistill-weighed": ("transformers/",)}
#: Checks of ranges, which are made on a CPU alone: for a GPU they are skipped.
ON_A_CPU_ALONE = {
    "llava_compodistill/ops/answer_loss/head.py: <genexpr>: _local_scalar_dense",
    "llava_compodistill/ops/visual_attention/__init__.py: <genexpr>: _local_scalar_dense",
}


def make_objective(siglip, folder, name, device="cpu"):
    """(student, objective) of a method in its dft stage."""
    student = make_model(siglip, seed=2, dtype=torch.float32).to(device).train()
    values = {"stage": "dft", "report_to": "none", "method": name.split("-")[0], "use_cpu": device == "cpu"}
    values |= {"student_layers": "0,2,3", "teacher_layers": "1,2,3,4,5", **METHODS[name]}
    args = TrainingArguments(str(folder), **values)
    teacher = None
    if args.distilled:
        teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
        teacher = teacher.requires_grad_(False).to(device)
    objective = Objective(student, teacher, args.chosen_method.terms("dft", args), 91)
    for module in objective.modules.values():
        module.to(device)
    return student, objective


def step(student, objective, inputs, found=None):
    """Forward and backward of a micro-batch."""
    with objective.running(), facts.kept(found, inputs):
        sums = objective(student, inputs)
        sum(found.loss for found in sums.values() if found.loss is not None).backward()


def batch_on(device):
    """A batch on a device (on a CPU: other tensors), and its facts."""
    here = make_batch(LAYOUTS, dtype=torch.float32).inputs
    there = {name: value.clone().to(device) for name, value in here.items()}
    return {**there, "use_cache": False}, facts.BatchFacts.of(here, 16, None)


@pytest.mark.parametrize("name", METHODS)
def test_no_micro_batch_waits(siglip, tmp_path, monkeypatch, name):
    student, objective = make_objective(siglip, tmp_path, name)
    inputs, found = batch_on("cpu")
    assert found.text.keys() == {"input_ids", "labels", "attention_mask"}
    step(student, objective, inputs, found)  # what is made once, is made
    waits = Waits()
    waits.on_cpu(found.text.values())
    student.zero_grad()
    with waits.counting(monkeypatch):
        step(student, objective, inputs, found)
    places = set(waits.places) - ON_A_CPU_ALONE
    assert [place for place in places if not place.startswith(LEFT.get(name, ("nothing",)))] == []
    assert bool(places) == (name in LEFT)

    gradients = [weight.grad.clone() for weight in student.parameters() if weight.grad is not None]

    # Without the tensors that stay, the device is asked for them, once a model; the gradients are the same.
    student.zero_grad()
    without = Waits()
    with without.counting(monkeypatch):
        step(student, objective, inputs)
    again = [weight.grad for weight in student.parameters() if weight.grad is not None]
    assert len(again) > 20 and all(map(torch.equal, gradients, again))
    passes = 1 if objective.teacher is None else 3 if "weighed" in name else 2
    assert without.places["llava_compodistill/hosts/base.py: on_cpu: cpu"] == 3 * passes
    assert set(without.places) - places - ON_A_CPU_ALONE == {"llava_compodistill/hosts/base.py: on_cpu: cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(METHODS.keys() - LEFT))
def test_no_micro_batch_waits_for_a_gpu(siglip, tmp_path, name):
    student, objective = make_objective(siglip, tmp_path, name, "cuda")
    inputs, found = batch_on("cuda")
    for _ in range(2):
        step(student, objective, inputs, found)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, objective, inputs, found)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_trainer_waits_for_nothing_in_a_micro_batch(dft, monkeypatch):
    waits, original, prepare = Waits(), CompoDistillTrainer.training_step, CompoDistillTrainer._prepare_inputs
    made = []

    def training_step(self, model, inputs, *args, **kwargs):
        made.append(inputs)
        waits.on_cpu(inputs[facts.KEY].text.values())
        if self.state.global_step == 0:  # what is made once, is made
            return original(self, model, inputs, *args, **kwargs)
        with waits.counting(monkeypatch):
            return original(self, model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        prepared = prepare(self, inputs)
        return {name: value.clone() if torch.is_tensor(value) else value for name, value in prepared.items()}

    monkeypatch.setattr(CompoDistillTrainer, "training_step", training_step)
    monkeypatch.setattr(CompoDistillTrainer, "_prepare_inputs", _prepare_inputs)
    trainer, log = dft(gradient_accumulation_steps=2, gradient_checkpointing=True, max_steps=2)
    assert len(made) == 4 and len(log) == 2 and log[1]["attention"] > 0
    assert set(waits.places) <= ON_A_CPU_ALONE, waits.places
    # The loop would ask each micro-batch's loss whether it is finite, which `finite` does with the log.
    assert not trainer.args.logging_nan_inf_filter


def test_lists_of_keys_in_order_are_made_without_asking(monkeypatch):
    index = torch.tensor([[2, 3, 7], [1, 4, -1]])
    expected = key_lists(index.clone(), None, 9)
    waits = Waits()
    with waits.counting(monkeypatch):
        found = key_lists(index, None, 9, in_order=True)
        assert not waits.places
        key_lists(index.clone(), None, 9)
        assert list(waits.places) == [
            "llava_compodistill/ops/visual_attention/key_lists.py: _make: _local_scalar_dense"
        ]
    for mine, other in zip(found, expected, strict=True):
        assert mine is other is None or torch.equal(mine, other)
    batch = base.MergedBatch(index, torch.ones(2, 9, dtype=torch.bool), index)
    assert not batch.in_order, "who has made it otherwise may have another order"


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x[0]),
        lambda x: range(x.long()[0]),
        lambda x: x[x > 0],
        lambda x: x[[0, 2]],
        lambda x: x.index_put((x > 0,), x[1:]),
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_counts_as_waiting(monkeypatch, ask):
    x = torch.tensor([0.0, 1.0, 2.0])
    waits = Waits()
    with waits.counting(monkeypatch), warnings.catch_warnings():
        y = x * 2
        z = y.masked_fill(y > 1, 0.0) + torch.where(y > 1, y, 1.0)
        z[z > 5] = 0.0
        assert not waits.places
        ask(y)
        assert sum(waits.places.values()) == 1
        # The same, asked of what lies in the CPU's memory.
        known = torch.tensor([0.0, 1.0, 2.0])
        waits.on_cpu([known])
        ask(known * 2)
        assert sum(waits.places.values()) == 1
        ask(base.sent(known, known.device))
        assert sum(waits.places.values()) == 2
