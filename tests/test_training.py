"""Properties that training has in every stage, on the tiny world, through the real entry point."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import accelerate
import pytest
import tiny
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from llava_compodistill import checkpoint, train
from llava_compodistill.models import llava_core, projector
from llava_compodistill.trainer import CompoDistillTrainer, NonFiniteLossError

pytestmark = pytest.mark.invariant

TERMS = ("loss", "lm", "kl", "attention", "attention_similarity")
# Gradients show in the weights as they are: Adam would turn rounding of a zero gradient into a full step, clipping
# would hide a wrong scale.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0}


ROUNDS = [
    ("What color is the square?", "Red"),
    ("Describe the image.", "a red square above a blue circle"),
    ("How many objects are there?", "2"),
    ("Is the circle below the square?", "Yes"),
    ("Which color do you see?", "red and blue"),
]


def sample(number: int, image: str | None, rounds: int) -> dict:
    turns = []
    for place in range(rounds):
        question, answer = ROUNDS[(number + place) % len(ROUNDS)]
        marker = "<image>\n" if image is not None and place == 0 else ""
        turns += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": f"sample-{number}", "conversations": turns, **({} if image is None else {"image": image})}


@pytest.fixture(scope="session")
def mixed(world, tmp_path_factory):
    """16 samples: 12 with an image, 4 of text alone, one to three rounds each, answers of unequal length."""
    folder = world["data"] / "images"
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    samples = [sample(number, images[number] if number % 4 else None, 1 + number % 3) for number in range(16)]
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="session")
def sharp_teacher(teacher_path, tmp_path_factory):
    """The teacher with attention far from uniform, so that there is something to align with."""
    path = tmp_path_factory.mktemp("sharp") / "llava-sharp"
    shutil.copytree(teacher_path, path)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = weight * 0.25 / weight.std()
        elif "mm_projector" in name and name.endswith("weight"):
            weights[name] = weight * 0.3 / weight.std()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def dft(world, sharp_teacher, dpt_path, mixed, tmp_path):
    """Run DFT on the mixed data; returns (trainer, log)."""

    def run(name="dft", **changes):
        values = {
            "teacher_model_path": sharp_teacher,
            "mm_projector_type": "mlp2x_gelu",
            "data_path": mixed,
            "student_layers": "1,2,3",
            "teacher_layers": "1,2,3,4",
            **changes,
        }
        stage = values.pop("stage", "dft")
        trainer = tiny.run(world, stage, tmp_path / name, **values)
        return trainer, tiny.read_log(tmp_path / name)

    return run


def terms(log):
    return [[entry.get(name) for name in TERMS] for entry in log]


def assert_same_log(found, expected, tolerance=2e-4):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in TERMS:
            assert (name in ours) == (name in theirs), (name, ours, theirs)
            if name in ours:
                margin = max(tolerance, 1.1e-4) if name == "loss" else tolerance  # transformers 4.37 rounds the loss
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=margin), (name, ours, theirs)


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=0, msg=lambda message, n=name: f"{n}: {message}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------
def is_trained(stage: str, name: str) -> bool:
    """method.md, "Three stages", by name."""
    if "vision_tower" in name or "teacher_adapter" in name:
        return False
    if "mm_projector" in name:
        return True
    if stage in ("pt", "dpt"):
        return False
    return "lora_" in name if stage.endswith("lora") else True


@pytest.mark.parametrize("stage", ["pt", "dpt", "dft", "dft-lora", "sft", "sft-lora"])
def test_frozen_weights_stay_bit_equal_and_trained_ones_move(
    world, teacher_path, dpt_path, tmp_path, monkeypatch, stage
):
    before, teacher_before = {}, {}
    original = CompoDistillTrainer.train

    def snapshot_and_train(self, *args, **kwargs):
        before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        if self.objective.teacher is not None:
            teacher_before.update({n: p.detach().clone() for n, p in self.objective.teacher.named_parameters()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CompoDistillTrainer, "train", snapshot_and_train)
    options = {"max_steps": 3, "weight_decay": 0.1}
    if stage == "pt":
        options["mm_projector_type"] = "mlp2x_gelu"
    else:
        options["teacher_model_path"] = teacher_path
    if stage not in ("pt", "dpt"):
        options["pretrain_mm_mlp_adapter"] = dpt_path / "mm_projector.bin"
    if stage.endswith("lora"):
        options |= {"lora_enable": True, "lora_r": 4}
    trainer = tiny.run(world, stage.removesuffix("-lora"), tmp_path / "out", **options)

    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name in before if is_trained(stage, name)}
    assert moved == expected
    assert expected == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    if teacher_before:
        for name, parameter in trainer.objective.teacher.named_parameters():
            assert torch.equal(parameter, teacher_before[name]), name

    # Against the files that the stage started from.
    core = llava_core(trainer.model)
    teacher_file = load_file(teacher_path / "model.safetensors")
    for name, value in core.get_vision_tower().vision_tower.state_dict().items():
        file = load_file(world["siglip"] / "model.safetensors")
        assert any(torch.equal(value, other) for key, other in file.items() if key.endswith(name)), name
    if stage != "pt":
        for name, value in core.get_model().mm_projector.teacher_adapter.state_dict().items():
            assert torch.equal(value, teacher_file[f"model.mm_projector.{name}"]), name
    if stage in ("pt", "dpt", "dft-lora", "sft-lora"):
        base = load_file(world["qwen-student"] / "model.safetensors")
        found = {name.replace("base_layer.", ""): value for name, value in core.state_dict().items()}
        assert all(torch.equal(found[name], value) for name, value in base.items())


def test_the_teacher_is_no_part_of_the_student(dft):
    trainer, _ = dft()
    teacher = trainer.objective.teacher
    own = {id(p) for name, p in teacher.named_parameters() if "vision_tower" not in name}
    assert own and not own & {id(p) for p in trainer.model.parameters()}
    assert not own & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert teacher not in list(trainer.model.modules())
    pointers = {p.data_ptr() for name, p in teacher.named_parameters() if "vision_tower" not in name}
    assert not pointers & {value.data_ptr() for value in trainer.model.state_dict().values()}


def test_weight_decay_spares_norms_and_biases(dft):
    trainer, _ = dft(weight_decay=0.1, mm_projector_lr=2e-5)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = name.endswith("bias") or "norm" in name
            assert group["weight_decay"] == (0.0 if spared else 0.1), name
            assert (group["initial_lr"] == 2e-5) == ("mm_projector" in name), name


# ---------------------------------------------------------------------------------------------------------------------
# What a step is
# ---------------------------------------------------------------------------------------------------------------------
def test_accumulation_does_not_change_a_step(dft):
    options = {**PLAIN, "max_steps": 3}
    whole, expected = dft("whole", per_device_train_batch_size=8, **options)
    assert expected[0]["attention"] > 0.01, "too alike to test the attention term"
    parts, found = dft("parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    assert_same_log(found[:1], expected[:1], 2e-5)
    start = load_file(llava_path(whole))
    steps = {n: (p - start[n]).abs().max().item() for n, p in trained_weights(whole.model).items() if n in start}
    assert max(steps.values()) > 1e-2
    assert_same_log(found, expected)
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)


def llava_path(trainer):
    return os.path.join(llava_core(trainer.model).config._name_or_path, "model.safetensors")


def test_uneven_accumulation_is_one_batch_too(dft):
    """3 + 3 + 3 ... samples of one step count like 9, not like three means."""
    options = {**PLAIN, "max_steps": 1}
    whole, expected = dft("whole", per_device_train_batch_size=6, **options)
    for size, parts in ((2, 3), (3, 2)):
        other, found = dft(f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=parts, **options)
        assert_same_log(found, expected, 2e-5)
        assert_same_weights(trained_weights(other.model), trained_weights(whole.model), 1e-6)


def test_accumulation_longer_than_an_epoch_still_trains(dft):
    """Every optimizer step uses what was seen before it."""
    trainer, log = dft(per_device_train_batch_size=2, gradient_accumulation_steps=16, max_steps=2, **PLAIN)
    base = load_file(llava_path(trainer))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (trained_weights(trainer.model)[name] - base[name]).abs().max() > 1e-4
    assert [entry["step"] for entry in log] == [1, 2]
    for entry in log:
        assert 5 < entry["lm"] < 8 and entry["loss"] == pytest.approx(sum(entry[t] for t in TERMS[1:4]), rel=1e-4)
    assert log[1]["lm"] < log[0]["lm"]


def test_lm_is_the_models_own_loss(dft, mixed, tmp_path):
    """transformers' cross-entropy over LLaVA's merged batch, also where the limit cuts answers off."""
    record = json.loads(mixed.read_text())[5]  # three rounds, the last with a longer answer
    (tmp_path / "one.json").write_text(json.dumps([record] * 2))
    options = {"data_path": tmp_path / "one.json", "learning_rate": 0, "max_steps": 1}
    limit, answers = 512, []
    for _ in range(2):
        trainer, log = dft(f"{limit}", model_max_length=limit, **options)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        merge = [batch[name] for name in ("input_ids", "attention_mask", "labels", "images")]
        with torch.no_grad():
            expected = trainer.model(**batch).loss
            labels = trainer.model.prepare_inputs_labels_for_multimodal(merge[0], None, merge[1], None, *merge[2:])[5]
        answers.append(int((labels[:, 1:] != -100).sum()))
        assert log[0]["lm"] == pytest.approx(float(expected), rel=1e-5)
        limit = labels.shape[1] - 3  # the newline, the end token and the end of the last answer go
    assert answers[0] - 3 <= answers[1] < answers[0]


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(dft):
    _, plain = dft("plain", max_steps=1)
    _, log = dft("weighted", max_steps=1, lm_weight=0.5, kl_weight=2.0, attention_weight=3.0)
    for name in ("lm", "kl", "attention", "attention_similarity"):
        assert log[0][name] == pytest.approx(plain[0][name], rel=1e-5), "terms are logged without their weights"
    assert plain[0]["loss"] == pytest.approx(plain[0]["lm"] + plain[0]["kl"] + plain[0]["attention"], rel=1e-4)
    expected = 0.5 * log[0]["lm"] + 2 * log[0]["kl"] + 3 * log[0]["attention"]
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_logged_terms_are_means_over_the_steps_since_the_last_log(dft):
    _, each = dft("each", max_steps=4, per_device_train_batch_size=4)
    _, pairs = dft("pairs", max_steps=4, per_device_train_batch_size=4, logging_steps=2)
    assert len(pairs) == 2
    for position, entry in enumerate(pairs):
        two = each[2 * position : 2 * position + 2]
        for name in ("lm", "kl", "attention"):
            assert entry[name] == pytest.approx(sum(e[name] for e in two) / 2, rel=1e-4), name
        low, high = sorted(e["attention_similarity"] for e in two)  # a mean over samples
        assert low <= entry["attention_similarity"] <= high


def test_evaluation_does_not_enter_the_logged_terms(dft, monkeypatch):
    options = {"max_steps": 2, "per_device_eval_batch_size": 4}
    _, expected = dft("without", **options)
    original = train.make_data_module
    monkeypatch.setattr(
        train, "make_data_module", lambda *a: {**(module := original(*a)), "eval_dataset": module["train_dataset"]}
    )
    trainer, found = dft("with", evaluation_strategy="steps", eval_steps=1, prediction_loss_only=True, **options)
    assert_same_log(found, expected, 1e-6)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and all(5 < value < 9 for value in evaluated)


# ---------------------------------------------------------------------------------------------------------------------
# The terms
# ---------------------------------------------------------------------------------------------------------------------
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
    groups = trainer.objective.groups
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
    assert trainer.objective.groups == [[2], [4]]
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
    assert dict(zip(trainer.objective.student_layers, trainer.objective.groups, strict=True)) == groups
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


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing and precision
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "lora", "dpt"])
def test_gradient_checkpointing_gives_the_same_training(dft, kind, world):
    options = {
        "full": PLAIN,
        "lora": {**PLAIN, "lora_enable": True, "lora_r": 4, "lora_dropout": 0},
        "dpt": {**PLAIN, "stage": "dpt", "mm_projector_type": "taf", "data_path": world["data"] / "pretrain.json"},
    }[kind]
    plain, expected = dft("plain", max_steps=3, **options)
    saving, found = dft("saving", max_steps=3, gradient_checkpointing=True, **options)
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.model.modules())
    assert_same_log(found, expected, 2e-5)
    assert_same_weights(trained_weights(saving.model), trained_weights(plain.model), 1e-6)


@pytest.mark.parametrize("kind", ["taf", "no taf", "adaptive", "lora"])
def test_bf16_stays_near_fp32(dft, sharp_teacher, kind):
    options = {"max_steps": 3, "learning_rate": 1e-3}
    if kind != "no taf":
        options["mm_projector_type"] = "taf"
    if kind == "adaptive":
        options["layer_matching"] = "adaptive"
    if kind == "lora":
        options |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0}
    _, expected = dft("fp32", **options)
    trainer, found = dft("bf16", bf16=True, **options)
    assert next(trainer.objective.teacher.parameters()).dtype == torch.bfloat16
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}, "AdamW on bf16 weights loses small updates"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm"] == pytest.approx(theirs["lm"], rel=0.01)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.3, abs=0.01)
        assert ours["attention"] == pytest.approx(theirs["attention"], rel=0.1, abs=0.01)
    assert any(ours["lm"] != theirs["lm"] for ours, theirs in zip(found, expected, strict=True)), "not in bf16 at all"


def test_lora_goes_on_in_fp32_from_a_checkpoint_in_bf16(dft, world, dpt_path, tmp_path):
    lora = {"lora_enable": True, "lora_r": 4, "bf16": True, "mm_projector_type": "taf"}
    dft("first", pretrain_mm_mlp_adapter=dpt_path / "mm_projector.bin", max_steps=1, **lora)
    trainer, _ = dft("second", stage="sft", model_name_or_path=tmp_path / "first", max_steps=1, **lora)
    kinds = {"base": set(), "trained": set()}
    for name, parameter in llava_core(trainer.model).get_model().layers.named_parameters():
        kinds["trained" if "lora_" in name else "base"].add(parameter.dtype)
    assert kinds == {"base": {torch.bfloat16}, "trained": {torch.float32}}
    assert projector(trainer.model).student_map[0].weight.dtype == torch.float32


@pytest.mark.parametrize("same_teacher", [True, False])
def test_what_the_student_computes_does_not_depend_on_the_teacher(
    dft, teacher_path, sharp_teacher, dpt_path, tmp_path, same_teacher, caplog
):
    """Shared encoding is a saving: the student's own loss is what it would be alone, also with a foreign teacher."""
    dft("start", stage="sft", pretrain_mm_mlp_adapter=dpt_path / "mm_projector.bin", mm_projector_type="taf",
        teacher_model_path=teacher_path, max_steps=1)  # fmt: skip
    options = {"model_name_or_path": tmp_path / "start", "mm_projector_type": "taf", "max_steps": 1}
    _, alone = dft("alone", stage="sft", **options)
    caplog.clear()
    _, taught = dft("taught", teacher_model_path=teacher_path if same_teacher else sharp_teacher, **options)
    assert taught[0]["lm"] == pytest.approx(alone[0]["lm"], rel=1e-6)
    assert ("is not this teacher's" in caplog.text) == (not same_teacher)


def test_a_narrower_teacher(dft):
    _, expected = dft("fp32", max_steps=1)
    trainer, found = dft("bf16", max_steps=1, teacher_dtype="bfloat16")
    assert next(trainer.objective.teacher.parameters()).dtype == torch.bfloat16
    assert found[0]["lm"] == expected[0]["lm"]
    assert found[0]["kl"] == pytest.approx(expected[0]["kl"], rel=0.3, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


RUNS = {
    "adapter": {"stage": "dpt", "mm_projector_type": "taf"},
    "full": {},
    "full-grouped": {"group_by_modality_length": True},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1},
    "lora-grouped": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "group_by_modality_length": True},
}


@pytest.mark.parametrize(
    "kind, killed_at", [("adapter", 10), ("full", 4), ("full-grouped", 10), ("lora", 10), ("lora-grouped", 4)]
)
def test_a_resumed_run_equals_an_unbroken_one(dft, world, monkeypatch, tmp_path, kind, killed_at):
    """8 steps an epoch, 12 steps in all, killed before or after the boundary."""
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, **RUNS[kind]}
    if kind == "adapter":
        records = json.loads((world["data"] / "pretrain.json").read_text())[:16]
        options["data_path"] = tmp_path / "captions.json"
        options["data_path"].write_text(json.dumps(records))
    unbroken, expected = dft("unbroken", **options)
    assert len(expected) == 12

    original = CompoDistillTrainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Killed

    saving = {"save_strategy": "steps", "save_steps": killed_at, **options}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CompoDistillTrainer, "_save_checkpoint", save_and_die)
        dft("broken", **saving)
    assert checkpoint.last_complete(str(tmp_path / "broken")).endswith(f"checkpoint-{killed_at}")
    resumed, found = dft("broken", **saving)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
def launch(flags, processes=2, entry=("-m", "llava_compodistill.train"), **environment):
    """Run the entry point under torchrun, on the CPU; returns its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *entry, *flags]
    environment = tiny.environment(**environment)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def parallel_flags(world, teacher, mixed, output, **changes):
    values = {
        **PLAIN,
        "teacher_model_path": teacher,
        "mm_projector_type": "mlp2x_gelu",
        "data_path": mixed,
        "student_layers": "1,2,3",
        "teacher_layers": "1,2,3,4",
        "max_steps": 3,
        **changes,
    }
    return tiny.flags(world, "dft", output, **values)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(dft, world, sharp_teacher, mixed, tmp_path):
    # Into the second epoch, whose order both have to draw alike.
    single, expected = dft("one", max_steps=6, gradient_accumulation_steps=2, **PLAIN)
    launch(parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", ddp_backend="gloo", max_steps=6))
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-5)
    weights = load_file(tmp_path / "two" / "model.safetensors")
    names = {name: p for name, p in trained_weights(single.model).items()}
    assert_same_weights({name: weights[name] for name in names}, names, 1e-5)


def zero_config(folder, stage: int):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # the tiny weights too are partitioned
    values = {
        name: "auto" for name in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    }
    path = folder / f"zero{stage}.json"
    values |= {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    path.write_text(json.dumps({**values, "zero_optimization": zero, "zero_allow_untested_optimizer": True}))
    return path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage, kind", [(2, "full"), (3, "lora")])
def test_deepspeed_gives_the_losses_of_one_process(dft, world, dpt_path, sharp_teacher, mixed, tmp_path, stage, kind):
    options = {"pretrain_mm_mlp_adapter": dpt_path / "mm_projector.bin", "mm_projector_type": "taf"}
    if (
        kind == "lora"
    ):  # whose A starts from random numbers, and ZeRO-3 draws others: B = 0 hides them in the first step
        options |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "learning_rate": 0}
    options = {**PLAIN, **options}
    single, expected = dft("one", max_steps=3, gradient_accumulation_steps=2, **options)
    # Told to use the CPU, accelerate before 1.0 forgets DeepSpeed; newer ones stay with one process unless told.
    modern = Version(accelerate.__version__) >= Version("1.0")
    device = {"ddp_backend": "gloo"} if modern else {"use_cpu": None}
    config = zero_config(tmp_path, stage)
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", deepspeed=config, **device, **options)
    # With a GPU accelerate starts DeepSpeed's communication; on the CPU it starts torch's alone.
    (tmp_path / "entry.py").write_text(
        "import deepspeed, runpy\n"
        "deepspeed.ops.__compatible_ops__.pop('deepspeed_shm_comm', None)\n"  # compiled on first use, not needed
        "initialize = deepspeed.initialize\n"
        "deepspeed.initialize = lambda *a, **k: print('ENGINE', flush=True) or initialize(*a, **k)\n"
        "deepspeed.init_distributed('gloo', auto_mpi_discovery=False)\n"
        "runpy.run_module('llava_compodistill.train', run_name='__main__')\n"
    )
    output = launch(flags, entry=[str(tmp_path / "entry.py")], DS_ACCELERATOR="cpu")
    assert output.count("ENGINE") == 2, "DeepSpeed was not used"
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-4)
    if kind == "full":
        saved = load_file(tmp_path / "two" / "model.safetensors")
    else:
        saved = torch.load(tmp_path / "two" / "non_lora_trainables.bin")
        assert len(load_file(tmp_path / "two" / "adapter_model.safetensors")) == 4 * 7 * 2
    expected = {
        n: p for n, p in single.model.named_parameters() if "mm_projector" in n or n.startswith("model.layers")
    }
    assert_same_weights({name: saved[name] for name in expected}, expected, 1e-4)
