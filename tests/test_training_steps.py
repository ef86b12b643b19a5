"""What is trained and what a step is, through the real entry point; saving memory changes neither."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from checks import PLAIN, TERMS, assert_same_log, assert_same_weights, trained_weights
from safetensors.torch import load_file

from llava_compodistill.hosts.llava.model import llava_core, projector
from llava_compodistill.train import run as train
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant


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
        assert batch.pop("facts").answer_tokens > 0  # for the trainer alone
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


def test_plain_pretraining_can_start_from_the_teachers_adapter(dft, world, sharp_teacher):
    """PT under TAF, a recipe of Table 14: the teacher gives its adapter, and is in no loss."""
    options = {"stage": "pt", "mm_projector_type": "taf", "data_path": world["data"] / "pretrain.json"}
    trainer, log = dft(version="plain", **options)
    assert trainer.objective.teacher is None and "kl" not in log[0]
    weights = load_file(sharp_teacher / "model.safetensors")
    fetched = llava_core(trainer.model).get_model().mm_projector.teacher_adapter.state_dict()
    for name, value in fetched.items():
        assert torch.equal(value, weights[f"model.mm_projector.{name}"]), name


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
    assert ("does not match this teacher's" in caplog.text) == (not same_teacher)


def test_a_narrower_teacher(dft):
    _, expected = dft("fp32", max_steps=1)
    trainer, found = dft("bf16", max_steps=1, teacher_dtype="bfloat16")
    assert next(trainer.objective.teacher.parameters()).dtype == torch.bfloat16
    assert found[0]["lm"] == expected[0]["lm"]
    assert found[0]["kl"] == pytest.approx(expected[0]["kl"], rel=0.3, abs=0.01)
