"""A run that was killed and resumed equals one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import transformers
from checks import assert_same_log, assert_same_weights, trained_weights

from llava_compodistill.errors import CheckpointError
from llava_compodistill.train import resume
from llava_compodistill.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant


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
    assert resume.last_complete(str(tmp_path / "broken")).endswith(f"checkpoint-{killed_at}")
    resumed, found = dft("broken", **saving)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------
SAVED = {
    "adapter": {"stage": "pt"},
    "full": {"stage": "sft"},
    "lora": {"stage": "sft", "lora_enable": True, "lora_r": 4},
}


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A folder with checkpoint-1, -2 (both of three steps) and the finished checkpoint-3, by kind."""
    made: dict[str, Path] = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("saved") / kind
            options = {"mm_projector_type": "mlp2x_gelu", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
            tiny.run(world, output=made[kind], **options, **SAVED[kind])
        return made[kind]

    return make


def cut(path):
    """What a kill in the middle of writing leaves."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGES = [
    ("full", "trainer_state.json", cut),
    ("full", "trainer_state.json", empty),
    ("full", "trainer_state.json", Path.unlink),
    ("full", "trainer_state.json", lambda path: path.write_text("{}")),
    ("full", "trainer_state.json", lambda path: path.write_text("[" * 100_000)),
    ("full", "config.json", cut),
    ("full", "model.safetensors", cut),
    ("full", "model.safetensors", empty),
    ("full", "model.safetensors", Path.unlink),
    ("full", "optimizer.pt", cut),
    ("full", "optimizer.pt", Path.unlink),
    ("full", "scheduler.pt", Path.unlink),
    ("full", "rng_state.pth", empty),
    ("full", "compodistill_run.json", cut),
    ("adapter", "mm_projector.bin", cut),
    ("adapter", "mm_projector.bin", Path.unlink),
    ("lora", "adapter_config.json", cut),
    ("lora", "adapter_model.safetensors", cut),
    ("lora", "adapter_model.safetensors", Path.unlink),
    ("lora", "non_lora_trainables.bin", cut),
    ("lora", "non_lora_trainables.bin", Path.unlink),
]


@pytest.mark.parametrize("kind, name, damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(saved, tmp_path, caplog, kind, name, damage):
    for step in (1, 2):
        shutil.copytree(saved(kind) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "incomplete" not in caplog.text
    damage(tmp_path / "checkpoint-2" / name)
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2 is incomplete" in caplog.text
    assert name in caplog.text or "there are no weights" in caplog.text


def test_a_missing_or_torn_shard_is_noticed(saved, tmp_path, caplog):
    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    folder = tmp_path / "checkpoint-2"
    parts = [f"model-{number}-of-2.safetensors" for number in (1, 2)]
    for part in parts:
        shutil.copy(folder / "model.safetensors", folder / part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    assert resume.last_complete(str(tmp_path)) == str(folder)
    cut(folder / parts[1])
    assert resume.last_complete(str(tmp_path)) is None and f"{parts[1]} is damaged" in caplog.text
    (folder / parts[1]).unlink()
    assert resume.last_complete(str(tmp_path)) is None and f"{parts[1]} is missing" in caplog.text


def test_folders_that_are_not_the_trainers_are_left_alone(saved, tmp_path, caplog):
    assert resume.last_complete(str(tmp_path / "none")) is None
    for name in ("checkpoint-final", "tmp-checkpoint-200", "checkpoint-7.bak"):
        shutil.copytree(saved("adapter") / "checkpoint-2", tmp_path / name)
    assert resume.last_complete(str(tmp_path)) is None and "incomplete" not in caplog.text
    for step in (2, 10, 9):  # by number, not by letters
        shutil.copytree(saved("adapter") / "checkpoint-2", tmp_path / f"checkpoint-{step}")
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_a_finished_run_needs_no_optimizer(saved, tmp_path):
    shutil.copytree(saved("full") / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-3")


def test_a_run_restarts_from_the_checkpoint_before_a_torn_one(world, saved, tmp_path, caplog):
    output = tmp_path / "out"
    shutil.copytree(saved("full"), output)
    shutil.rmtree(output / "checkpoint-3")
    cut(output / "checkpoint-2" / "trainer_state.json")
    options = {"mm_projector_type": "mlp2x_gelu", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.run(world, output=output, **options, **SAVED["full"])
    assert trainer.state.global_step == 3 and "checkpoint-2 is incomplete" in caplog.text
    assert len(trainer.state.log_history) >= 3, "the steps before it are the checkpoint's"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of another command
# ---------------------------------------------------------------------------------------------------------------------
RUN = {
    "mm_projector_type": "mlp2x_gelu",
    "stage": "sft",
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}


def settings(world, output, **changes):
    flags = tiny.flags(world, output=output, **{**RUN, **changes})
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return resume.describe(*parser.parse_args_into_dataclasses(args=flags))


COUNTS = {
    "learning_rate": (2e-3, "0.001 there, 0.002 in this command"),
    "seed": (7, "42 there, 7"),
    "max_steps": (5, "3 there, 5"),
    "version": ("qwen_base", "'qwen_1_5' there, 'qwen_base'"),
    "weight_decay": (0.1, "0.0 there, 0.1"),
    "lr_scheduler_type": ("cosine", "'linear' there, 'cosine'"),
    "warmup_ratio": (0.5, "0.0 there, 0.5"),
    "model_max_length": (256, "512 there, 256"),
    "mm_projector_lr": (1e-4, "None there, 0.0001"),
    "stage": ("dft", "'sft' there, 'dft'"),
    "lora_enable": (True, "False there, True"),
    "kl_weight": (2.0, "1.0 there, 2.0"),
    "attention_schedule": ("linear", "'constant' there, 'linear'"),
    "student_layers": ("early", "'intermediate' there, 'early'"),
    "bf16": (True, "False there, True"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_setting_that_changes_the_result_is_refused_with_both_values(world, saved, tmp_path, name):
    value, message = COUNTS[name]
    run = settings(world, tmp_path, **{name: value})
    with pytest.raises(
        CheckpointError, match=rf"(?s)checkpoint-3 was made with other settings:.*{name}: {message}"
    ) as error:
        resume.checkpoint_to_resume(str(saved("full")), run)
    assert "--resume_anyway True" in str(error.value) and "--output_dir" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logging_steps": 5, "save_steps": 2, "save_total_limit": 3},
        {"output_dir": "elsewhere", "report_to": "tensorboard"},
        {"dataloader_num_workers": 2, "gradient_checkpointing": True, "attention_map_impl": "eager"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"bad_samples": "skip"},
        {"lora_r": 8},  # of no LoRA
    ],
    ids=str,
)
def test_what_does_not_change_the_result_does_not_count(world, saved, tmp_path, changes):
    run = settings(world, tmp_path, **changes)
    assert resume.checkpoint_to_resume(str(saved("full")), run) == str(saved("full") / "checkpoint-3")


def test_data_count_by_place_and_size_and_models_by_place(world, tmp_path, monkeypatch):
    data = tmp_path / "data.json"
    shutil.copy(world["data"] / "instruct_student.json", data)
    before = settings(world, tmp_path, data_path=data)
    monkeypatch.chdir(tmp_path)
    assert settings(world, tmp_path, data_path="data.json") == before, "the same file, named otherwise"
    data.write_text(data.read_text() + " ")
    after = settings(world, tmp_path, data_path=data)
    assert {name for name in before if before[name] != after[name]} == {"data_bytes"}
    other = settings(world, tmp_path, data_path=data, model_name_or_path=world["llama"])
    assert {name for name in other if other[name] != after[name]} == {"model_name_or_path"}


def test_a_finished_folder_does_not_swallow_a_changed_command(world, tmp_path, caplog):
    """It would train nothing, keep the old weights and end well."""
    done = tiny.run(world, output=tmp_path / "out", **RUN)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="learning_rate: 0.001 there, 0.01 in this command"):
        tiny.run(world, output=tmp_path / "out", **RUN, learning_rate=1e-2)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    again = tiny.run(world, output=tmp_path / "out", **RUN, learning_rate=1e-2, resume_anyway=True)
    assert "was made with other settings (--resume_anyway):" in caplog.text
    assert_same_weights(trained_weights(again.model), trained_weights(done.model), 0)


def test_a_checkpoint_of_an_earlier_release_is_resumed_with_a_warning(world, saved, tmp_path, caplog):
    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "compodistill_run.json").unlink()
    run = settings(world, tmp_path, learning_rate=5.0)
    assert resume.checkpoint_to_resume(str(tmp_path), run) == str(tmp_path / "checkpoint-2")
    assert caplog.text.count("saved by an earlier release") == 1
