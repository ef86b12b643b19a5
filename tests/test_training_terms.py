"""The logged loss terms of real runs: attention, matchings and bands, text alone, and losses that are not finite."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import sample

from llava_compodistill.errors import NonFiniteLossError
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant


def test_an_identical_teacher_leaves_nothing_to_distil(dft, sharp_teacher):
    _, log = dft(model_name_or_path=sharp_teacher, student_layers="1,2,4", teacher_layers="1,2,4", max_steps=1)
    assert log[0]["lm"] > 1
    assert abs(log[0]["kl"]) < 1e-5 and abs(log[0]["attention"]) < 1e-5
    assert log[0]["attention_similarity"] == pytest.approx(1, abs=1e-5)


def test_a_batch_of_text_alone_trains_with_a_zero_attention_term(dft, tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([sample(number, None, 2) for number in range(4)]))
    trainer, log = dft(data_path=path, max_steps=2)
    assert len(log) == 2
    for entry in log:
        assert entry["attention"] == 0 and entry["lm"] > 1 and entry["kl"] > 0
        assert "attention_similarity" not in entry, "there is nothing to compare"
    assert log[1]["lm"] != log[0]["lm"]


def test_text_batches_do_not_dilute_the_logged_similarity(dft, mixed, tmp_path):
    text, image = json.loads(mixed.read_text())[:2]
    (tmp_path / "image.json").write_text(json.dumps([image] * 4))
    (tmp_path / "half.json").write_text(json.dumps([image, text] * 2))
    options = {"per_device_train_batch_size": 1, "learning_rate": 0, "max_steps": 4, "logging_steps": 4}
    _, expected = dft("image", data_path=tmp_path / "image.json", **options)
    _, found = dft("half", data_path=tmp_path / "half.json", **options)
    assert found[0]["attention_similarity"] == pytest.approx(expected[0]["attention_similarity"], rel=1e-4)
    assert found[0]["attention"] == pytest.approx(expected[0]["attention"] / 2, rel=1e-4)


def test_shuffled_targets_change_the_attention_term_alone(dft):
    _, plain = dft("plain", max_steps=1, per_device_train_batch_size=4)
    _, shuffled = dft("shuffled", max_steps=1, per_device_train_batch_size=4, shuffle_attention_targets=True)
    assert shuffled[0]["lm"] == pytest.approx(plain[0]["lm"]) and shuffled[0]["kl"] == pytest.approx(plain[0]["kl"])
    assert abs(shuffled[0]["attention"] - plain[0]["attention"]) > 1e-4
    with pytest.raises(ValueError, match="per_device_train_batch_size of at least 2"):
        dft(shuffle_attention_targets=True, per_device_train_batch_size=1)


@pytest.mark.parametrize(
    "similarity, kind, rows", [("row", "mse", "all"), ("row", "kl", "answer"), ("matrix", "cosine", "visual")]
)
def test_the_rival_terms_train(dft, similarity, kind, rows):
    trainer, log = dft(attention_loss=kind, attention_similarity=similarity, attention_rows=rows)
    assert all(entry["attention"] > 0 for entry in log)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("matching", ["simple", "adaptive"])
def test_simple_and_adaptive_matching(dft, matching):
    trainer, log = dft(layer_matching=matching, calibration_batches=2)
    groups = trainer.objective.term("attention").groups
    assert all(len(group) == 1 for group in groups) and len(groups) == 3
    flat = [group[0] for group in groups]
    assert flat == sorted(set(flat)) and set(flat) <= {1, 2, 3, 4}
    if matching == "simple":
        assert flat == [1, 3, 4]
    assert log[-1]["attention"] > 0


def test_adaptive_matching_finds_a_teachers_own_layers(dft, sharp_teacher):
    trainer, log = dft(
        model_name_or_path=sharp_teacher, student_layers="2,4", teacher_layers="1,2,3,4,5", layer_matching="adaptive",
        max_steps=1,
    )  # fmt: skip
    assert trainer.objective.term("attention").groups == [[2], [4]]
    assert abs(log[0]["attention"]) < 1e-5


@pytest.mark.parametrize(
    "student, teacher, groups",
    [
        ("intermediate", "intermediate", {2: [2, 3, 4]}),
        ("early", "early", {0: [0], 1: [1]}),
        ("later", "later", {3: [5]}),
        ("all", "all", {0: [0, 1, 2], 1: [1, 2, 3], 2: [2, 3, 4], 3: [3, 4, 5]}),
        ("0,3", "2,3,5", {0: [2, 3], 3: [3, 5]}),
    ],
)
def test_bands(dft, student, teacher, groups):
    trainer, log = dft(student_layers=student, teacher_layers=teacher, max_steps=1)
    assert (
        dict(
            zip(
                trainer.objective.term("attention").student_layers,
                trainer.objective.term("attention").groups,
                strict=True,
            )
        )
        == groups
    )
    assert log[0]["attention"] > 0


def test_more_student_than_teacher_layers_is_an_error_before_training(dft):
    with pytest.raises(ValueError, match="the student band .* has 3 and the teacher band .* has 2.*strategy 'simple'"):
        dft(student_layers="0,1,2", teacher_layers="3,4")


@pytest.mark.slow
def test_similarity_rises_with_vat_and_not_without(dft):
    options = {
        "max_steps": 50,
        "learning_rate": 4e-3,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
    }
    _, aligned = dft("vat", **options)
    _, alone = dft("no-vat", vat=False, measure_attention=True, **options)
    assert "attention" not in alone[0]

    def rise(log):
        similarity = [entry["attention_similarity"] for entry in log if "attention_similarity" in entry]
        return sum(similarity[-8:]) / 8 - sum(similarity[:2]) / 2

    assert aligned[0]["attention_similarity"] < 0.95
    assert rise(aligned) > 0.02
    assert rise(alone) < 0.3 * rise(aligned), (rise(aligned), rise(alone))


def test_similarity_is_measured_in_dpt_too(dft, world):
    options = {"stage": "dpt", "mm_projector_type": "taf", "data_path": world["data"] / "pretrain.json"}
    _, log = dft(measure_attention=True, **options)
    assert all(0 < entry["attention_similarity"] <= 1 and "attention" not in entry for entry in log)


def test_a_loss_that_is_not_finite_stops_with_its_name_and_step(dft, tmp_path):
    with pytest.raises(NonFiniteLossError, match="Step 1: the loss term kl became inf.*learning_rate"):
        dft(kl_weight="inf")
    assert not (tmp_path / "dft").exists() or not list((tmp_path / "dft").glob("*.safetensors"))


def test_a_loss_that_becomes_nan_later_is_named(dft, monkeypatch):
    original = CompoDistillTrainer.training_step

    def poison(self, model, *args, **kwargs):
        if self.state.global_step == 1:
            with torch.no_grad():
                llava_core(model).lm_head.weight.fill_(math.nan)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(CompoDistillTrainer, "training_step", poison)
    with pytest.raises(NonFiniteLossError, match="Step 2: the loss terms lm, kl became nan"):
        dft(max_steps=3)
