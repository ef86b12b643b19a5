"""L_ADL in other stages than DFT: what is computed, what is trained, and which teacher is loaded."""

from __future__ import annotations

import json

import pytest
import reference
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, trained_weights
from factory import encoder_features, make_batch, make_model
from test_capture import LAYOUTS, arguments, make_objective, merged_samples, weights_of

from llava_compodistill.train.arguments import TrainingArguments

pytestmark = pytest.mark.invariant


# ---------------------------------------------------------------------------------------------------------------------
# DPT
# ---------------------------------------------------------------------------------------------------------------------
def test_in_dpt_its_gradient_reaches_the_adapter_alone(siglip, tmp_path):
    """Through hidden states, since query and key projections are frozen; against the reference in float64."""
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, kv_heads=3, vocab=128, seed=1).requires_grad_(False)
    student = make_model(siglip, seed=2, teacher=teacher).requires_grad_(False)
    trained = student.get_model().mm_projector.student_map.requires_grad_(True)
    batch = make_batch(LAYOUTS)
    args = arguments(tmp_path, stage="dpt", attention_stages="dpt,dft")
    objective = make_objective(student, teacher, args, 91)
    _, _, attention, _, images = reference.loss_sums(
        (weights_of(student), student.config), (weights_of(teacher), teacher.config), merged_samples(batch),
        encoder_features(teacher, batch.inputs["images"]), [0, 2, 3], [[1, 2, 3], [2, 3, 4], [3, 4, 5]], 91,
    )  # fmt: skip
    expected = torch.autograd.grad(attention, list(trained.parameters()))
    assert images == 3 and all(gradient.abs().max() > 1e-4 for gradient in expected)
    with objective.running():
        loss = objective(student, {**batch.inputs, "use_cache": False})["attention"].loss
        torch.testing.assert_close(loss.double(), attention.detach(), rtol=1e-5, atol=0)
        loss.backward()
    for parameter, gradient in zip(trained.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)


@pytest.fixture
def captions(world, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(json.loads((world["data"] / "pretrain.json").read_text())[:8]))
    return {"stage": "dpt", "mm_projector_type": "taf", "version": "plain", "data_path": path, "mm_projector_lr": None}


def test_dpt_trains_it_with_the_language_model_frozen(dft, captions):
    options = {**captions, "attention_stages": "dpt", "attention_weight": 3.0, "max_steps": 3, "learning_rate": 1e-2}
    trainer, log = dft("aligned", **options)
    plain, without = dft("plain", **{**options, "attention_stages": "dft"})
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["lm"] + entry["kl"] + 3 * entry["attention"], rel=1e-4)
    assert not any("attention" in entry for entry in without)
    assert log[0]["lm"] == pytest.approx(without[0]["lm"]) and log[0]["kl"] == pytest.approx(without[0]["kl"])
    moved = trained_weights(trainer.model)
    assert moved and all("student_map" in name for name in moved)
    others = trained_weights(plain.model)
    assert any((moved[name] - others[name]).abs().max() > 1e-4 for name in moved), "L_ADL has trained nothing"


def test_in_dpt_accumulation_and_checkpointing_change_nothing(dft, captions):
    options = {**captions, **PLAIN, "attention_stages": "dpt,dft", "max_steps": 2}
    whole, expected = dft("whole", per_device_train_batch_size=4, **options)
    parts, found = dft(
        "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, gradient_checkpointing=True, **options
    )
    assert expected[0]["attention"] > 0.01, "too alike to test the attention term"
    assert_same_log(found, expected, 2e-5)
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# SFT
# ---------------------------------------------------------------------------------------------------------------------
def test_sft_takes_it_beside_the_labels_and_leaves_the_logits_out(dft):
    options = {"stage": "sft", "max_steps": 2, "attention_weight": 2.0}
    trainer, log = dft("aligned", attention_stages="dft,sft", **options)
    plain, without = dft("plain", **options)
    assert plain.objective.teacher is None and trainer.objective.teacher is not None
    assert [term.name for term in trainer.objective.terms] == ["answers", "attention"]
    for entry in log:
        assert "kl" not in entry
        assert entry["loss"] == pytest.approx(entry["lm"] + 2 * entry["attention"], rel=1e-4)
    # A run that loads a teacher, too: what loading draws at random comes before the adapter's weights.
    _, labels = dft("labels", stage="dft", kl_weight=0.0, vat=False, max_steps=2)
    assert log[0]["lm"] == pytest.approx(labels[0]["lm"], rel=1e-6)
    assert set(without[0]) & {"kl", "attention", "attention_similarity"} == set()
    theirs = trainer.objective.term("answers").needs()[1]
    assert not theirs.head, "the teacher's head would run for nothing"


def test_sft_and_dft_without_logits_are_one_thing(dft):
    """Gradients and all: L_LM + L_ADL."""
    options = {**PLAIN, "max_steps": 2}
    sft, found = dft("sft", stage="sft", attention_stages="sft", **options)
    alone, expected = dft("dft", kl_weight=0.0, **options)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "lm", "attention", "attention_similarity"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert_same_weights(trained_weights(sft.model), trained_weights(alone.model), 1e-6)


def test_no_stage_but_those_that_are_named_has_it(dft):
    _, log = dft(attention_stages="dpt,sft", max_steps=1)
    assert "attention" not in log[0] and "kl" in log[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"attention_stages": "dft,d2s"},
            "--attention_stages dft,d2s: name stages of .* compodistill, .* dpt, dft, sft",
        ),
        ({"attention_stages": "pt"}, "--attention_stages pt: name stages of method compodistill"),
        ({"attention_stages": ""}, r"--attention_stages : name stages .*--vat False"),
        ({"attention_stages": "sft", "method": "kd"}, "--attention_stages sft: method kd has no L_ADL"),
        ({"attention_stages": "dft,sft", "method": "llavadi"}, "method llavadi has no L_ADL"),
    ],
)
@pytest.mark.once
def test_a_stage_that_the_method_does_not_have_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


def test_which_stages_have_a_teacher(tmp_path):
    def found(**options):
        stages = {}
        for stage in ("pt", "dpt", "dft", "sft"):
            args = TrainingArguments(str(tmp_path), stage=stage, use_cpu=True, report_to=[], **options)
            names = [term.name for term in args.chosen_method.terms(stage, args)]
            stages[stage] = args.distilled, "attention" in names
        return stages

    plain = {"pt": (False, False), "dpt": (True, False), "dft": (True, True), "sft": (False, False)}
    assert found() == plain
    assert found(attention_stages="dpt,dft,sft") == {**plain, "dpt": (True, True), "sft": (True, True)}
    assert found(attention_stages="sft", method="release") == {**plain, "dft": (True, False), "sft": (True, True)}
    off = {**plain, "dft": (True, False)}
    assert found(attention_stages="dft,sft", vat=False) == found(attention_stages="sft", attention_weight=0.0) == off
    assert found(attention_stages="dft,sft", vat=False, measure_attention=True)["sft"] == (False, False)
    spelled = TrainingArguments(str(tmp_path), attention_stages="sft, dft", use_cpu=True, report_to=[])
    assert spelled.attention_stages == "dft,sft", "one way of writing, which checkpoints are compared by"


def test_a_teacher_that_is_not_named_is_asked_for_before_anything_is_loaded(dft, monkeypatch):
    from llava_compodistill.train import run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(run, "build_student", loaded)
    with pytest.raises(
        ValueError, match="--attention_stages dft,sft aligns .* --stage sft: give --teacher_model_path"
    ):
        dft(stage="sft", attention_stages="dft,sft", teacher_model_path=None)
