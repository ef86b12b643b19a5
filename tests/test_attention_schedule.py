"""The weight of L_ADL over a stage: a factor of the optimizer step, and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights

from llava_compodistill.methods import Sums, Term
from llava_compodistill.methods.schedule import Schedule
from llava_compodistill.train.arguments import TrainingArguments

pytestmark = pytest.mark.invariant

# f(0), f(1/4), f(1/2), f(3/4), f(1), written out.
FACTORS = {
    ("linear", 1.0): [1, 0.75, 0.5, 0.25, 0],
    ("linear", 0.5): [1, 0.5, 0, 0, 0],
    ("cosine", 1.0): [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0],
    ("cosine", 0.5): [1, 0.5, 0, 0, 0],
    ("warmup", 1.0): [0, 0.25, 0.5, 0.75, 1],
    ("warmup", 0.5): [0, 0.5, 1, 1, 1],
}


@pytest.mark.once
@pytest.mark.parametrize("kind, end", FACTORS)
def test_the_factors(kind, end):
    schedule = Schedule(kind, end)
    found = [schedule(progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(FACTORS[kind, end], abs=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("kind, end", [("constant", 1.0), ("linear", 0.0), ("linear", 1.5)])
def test_no_schedule(kind, end):
    with pytest.raises(ValueError, match=r"one of linear, cosine, warmup|in \(0, 1\]"):
        Schedule(kind, end)


def test_the_weight_in_force_is_in_the_loss_and_in_the_log(dft):
    options = {"max_steps": 4, "attention_weight": 3.0, "learning_rate": 0}
    _, constant = dft("constant", **options)
    _, log = dft("cosine", attention_schedule="cosine", attention_schedule_end=0.5, **options)
    factors = [1, 0.5, 0, 0]
    assert [entry["attention_weight"] for entry in log] == pytest.approx([3 * factor for factor in factors], abs=1e-6)
    assert not any("attention_weight" in entry for entry in constant)
    for entry, same, factor in zip(log, constant, factors, strict=True):
        assert entry["attention"] == pytest.approx(same["attention"], rel=1e-5), "logged without its weight"
        assert entry["loss"] == pytest.approx(entry["lm"] + entry["kl"] + 3 * factor * entry["attention"], rel=1e-4)
        assert same["loss"] == pytest.approx(same["lm"] + same["kl"] + 3 * same["attention"], rel=1e-4)


def test_between_two_logs_the_weight_is_that_of_the_last_step(dft):
    _, log = dft(max_steps=4, logging_steps=2, attention_schedule="linear")
    assert [entry["attention_weight"] for entry in log] == pytest.approx([0.75, 0.25])


def test_the_first_step_of_a_warmup_trains_without_the_term(dft):
    options = {**PLAIN, "max_steps": 1}
    warm, _ = dft("warm", attention_schedule="warmup", **options)
    without, _ = dft("without", vat=False, **options)
    whole, _ = dft("whole", **options)
    assert_same_weights(trained_weights(warm.model), trained_weights(without.model), 1e-7)
    name = "model.layers.2.self_attn.q_proj.weight"
    apart = trained_weights(whole.model)[name] - trained_weights(warm.model)[name]
    assert apart.abs().max() > 1e-5, "L_ADL is too weak to test anything"
    assert warm.objective.term("attention").schedule.end == 0.1


def test_accumulation_does_not_change_the_weight(dft):
    options = {**PLAIN, "max_steps": 3, "attention_schedule": "linear", "attention_weight": 2.0}
    whole, expected = dft("whole", per_device_train_batch_size=4, **options)
    parts, found = dft("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    weights = [[entry["attention_weight"] for entry in log] for log in (found, expected)]
    assert weights[0] == weights[1] == pytest.approx([2, 4 / 3, 2 / 3], abs=1e-6)
    assert_same_log(found, expected)
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)


def test_a_resumed_run_goes_on_with_the_weight(dft, monkeypatch):
    options = {"max_steps": 6, "attention_schedule": "cosine", "method": "release", "attention_weight": 0.5}
    unbroken, expected = dft("unbroken", **options)
    weights = [0.25 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert [entry["attention_weight"] for entry in expected] == pytest.approx(weights, abs=1e-6)
    resumed, found = killed_and_resumed(dft, monkeypatch, save_steps=4, **options)
    assert_same_log(found, expected, 1e-5)
    assert [entry["attention_weight"] for entry in found] == [entry["attention_weight"] for entry in expected]
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)


def test_any_term_can_have_a_schedule(dft, monkeypatch):
    """The trainer knows none by name."""
    import toy_method

    monkeypatch.setattr(toy_method.FeatureTerm, "schedule", Schedule("linear", 1.0), raising=False)
    _, log = dft(method="toy_method:Toy", max_steps=2)
    assert [entry["features_weight"] for entry in log] == pytest.approx([0.5, 0.25])
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["lm"] + entry["features_weight"] * entry["features"], rel=1e-4)


def test_a_term_may_say_its_weight_itself():
    class Third(Term):
        name = "third"
        weight = 3.0

        def __call__(self, student, teacher, returned):
            return Sums(None)

    term = Third()
    assert [term.weight_at(progress) for progress in (0, 0.5, 1)] == [3, 3, 3]
    term.schedule = Schedule("warmup", 1.0)
    assert [term.weight_at(progress) for progress in (0, 0.5, 1)] == [0, 1.5, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_schedule": "linear", "method": "kd"}, "--attention_schedule linear: method kd has no L_ADL"),
        ({"attention_schedule": "cosine", "method": "llava_kd"}, "method llava_kd has no L_ADL"),
        ({"attention_schedule_end": 0.5}, "--attention_schedule_end 0.5: a constant weight has no end"),
        ({"attention_schedule": "linear", "attention_schedule_end": 0.0}, "end 0.0: must be greater than 0"),
        ({"attention_schedule": "warmup", "attention_schedule_end": 1.2}, "end 1.2: must be .* at most 1"),
        ({"attention_schedule": "linear", "vat": False}, "with --vat False there is no L_ADL"),
        ({"attention_schedule": "linear", "attention_weight": 0.0}, "with --attention_weight 0 there is no L_ADL"),
    ],
)
@pytest.mark.once
def test_a_schedule_of_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


def test_a_weight_that_has_become_zero_does_not_hide_what_is_not_finite(dft, monkeypatch):
    """0 times nan is nan: the term that is to blame is named, whatever its weight."""
    from llava_compodistill.errors import NonFiniteLossError
    from llava_compodistill.methods.attention import VisualAttentionTerm

    original = VisualAttentionTerm.__call__

    def broken(self, *args):
        sums = original(self, *args)
        sums.loss = sums.loss * torch.nan
        sums.logged = {self.name: sums.loss.detach()}
        return sums

    monkeypatch.setattr(VisualAttentionTerm, "__call__", broken)
    with pytest.raises(NonFiniteLossError, match="the loss term attention became nan"):
        dft(max_steps=1, attention_schedule="warmup")
