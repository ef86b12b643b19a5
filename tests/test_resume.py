"""A run that was killed and resumed equals one that was not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from checks import assert_same_log, assert_same_weights, trained_weights

from llava_compodistill.errors import CheckpointError
from llava_compodistill.train import checkpoint, manifest, resume, run
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
    assert f"checkpoint-2 is incomplete (killed while saving?) and is passed over: {name} is " in caplog.text
    # An earlier release has left no manifest: the formats tell.
    caplog.clear()
    for folder in tmp_path.iterdir():
        (folder / manifest.MANIFEST_FILE).unlink()
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2 is incomplete" in caplog.text
    assert name in caplog.text or "there are no weights" in caplog.text


def test_a_tail_of_zeros_is_noticed(saved, tmp_path, caplog):
    """What a power cut leaves: the file has its length, and safetensors would load it."""
    for step in (1, 2):
        shutil.copytree(saved("full") / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(4096))
    assert resume.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert "model.safetensors is damaged (its first or last 64 KiB are not what was saved)" in caplog.text
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"checkpoint-{step}" / "tokenizer.json", ignore_errors=True)
        cut(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
    assert resume.last_complete(str(tmp_path)) is None
    assert "No checkpoint in" in caplog.text and "training begins at the first step" in caplog.text


def test_a_missing_or_torn_shard_is_noticed(saved, tmp_path, caplog):
    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    folder = tmp_path / "checkpoint-2"
    parts = [f"model-{number}-of-2.safetensors" for number in (1, 2)]
    for part in parts:
        shutil.copy(folder / "model.safetensors", folder / part)
    (folder / "model.safetensors").unlink()
    (folder / manifest.MANIFEST_FILE).unlink()
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
    manifest.seal(tmp_path / "checkpoint-3")
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
# Saving
# ---------------------------------------------------------------------------------------------------------------------
def test_no_checkpoint_goes_before_the_next_is_sealed(world, tmp_path, monkeypatch):
    options = {"mm_projector_type": "mlp2x_gelu", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    seal, present = manifest.seal, []

    def noted(folder, **kwargs):
        present.append(sorted(path.name for path in tmp_path.joinpath("out").glob("*checkpoint-*")))
        seal(folder, **kwargs)

    monkeypatch.setattr(manifest, "seal", noted)
    tiny.run(world, "pt", tmp_path / "out", **options, save_total_limit=1, verify_checkpoints=True)
    assert present == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.joinpath("out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert manifest.has_whole_hashes(tmp_path / "out" / "checkpoint-3")


def test_a_damaged_checkpoint_of_a_later_step_gives_way_to_new_ones(world, saved, tmp_path, caplog):
    """It is never sealed together with what a new run saves over it, and does not crowd out what is whole."""
    output = tmp_path / "out"
    shutil.copytree(saved("full"), output)
    shutil.rmtree(output / "checkpoint-3")
    cut(output / "checkpoint-2" / "config.json")
    (output / "checkpoint-2" / "rng_state_7.pth").touch()
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-9")
    options = {"mm_projector_type": "mlp2x_gelu", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    tiny.run(world, output=output, **options, **SAVED["full"], save_total_limit=2)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert resume.damage(output / "checkpoint-2") is None
    assert not (output / "checkpoint-2" / "rng_state_7.pth").exists()


@pytest.mark.parametrize(
    "limit, best, kept",
    [(None, None, [1, 2, 3, 5]), (0, None, [1, 2, 3, 5]), (1, None, [3]), (2, None, [2, 3]), (3, None, [1, 2, 3]),
     (4, None, [1, 2, 3, 5]), (1, 1, [1, 3]), (2, 1, [1, 3]), (3, 1, [1, 2, 3]), (1, 3, [3])],
)  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path, limit, best, kept):
    """Of checkpoint-3, the one just saved; checkpoint-5 is of a run that went further and was damaged."""
    for step in (1, 2, 3, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    checkpoint._rotate(
        tmp_path / "checkpoint-3", limit, None if best is None else str(tmp_path / f"checkpoint-{best}")
    )
    assert sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-[0-9]*")) == kept
    assert (tmp_path / "checkpoint-final").is_dir()


def test_the_result_is_on_the_disk(world, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(manifest, "flush", lambda folder, **options: flushed.append((str(folder), options)))
    tiny.run(world, "pt", tmp_path / "out", mm_projector_type="mlp2x_gelu")
    assert flushed == [(str(tmp_path / "out"), {"subfolders": False})]


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
    "check_images": (False, "True there, False"),
    "allow_outside_images": (True, "False there, True"),
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
    (tmp_path / "checkpoint-2" / manifest.MANIFEST_FILE).unlink()
    run = settings(world, tmp_path, learning_rate=5.0)
    assert resume.checkpoint_to_resume(str(tmp_path), run) == str(tmp_path / "checkpoint-2")
    assert caplog.text.count("saved by an earlier release: whether") == 1
    assert caplog.text.count("saved by an earlier release, without a manifest") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint lacks, or holds besides
# ---------------------------------------------------------------------------------------------------------------------
def test_whole_hashes_are_compared_where_asked_for(world, saved, tmp_path, caplog):
    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    run = settings(world, tmp_path)
    assert resume.checkpoint_to_resume(str(tmp_path), run, verify=True) and "saved without --verify" in caplog.text
    manifest.seal(tmp_path / "checkpoint-2", whole=True)
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert resume.checkpoint_to_resume(str(tmp_path), run) == str(tmp_path / "checkpoint-2")
    assert resume.checkpoint_to_resume(str(tmp_path), run, verify=True) is None
    assert "model.safetensors is damaged (its SHA-256" in caplog.text


def test_code_in_a_checkpoint_needs_consent(world, saved, tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.save(Code(), tmp_path / "checkpoint-2" / "scheduler.pt")
    manifest.seal(tmp_path / "checkpoint-2")
    run = settings(world, tmp_path)
    with pytest.raises(CheckpointError, match="(?s)would run code.*scheduler.pt: __builtin__ print"):
        resume.checkpoint_to_resume(str(tmp_path), run)
    folder = resume.checkpoint_to_resume(str(tmp_path), {**run, "trust_checkpoint": True}, trusted=True)
    assert folder == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    "ranks, fp16, named",
    [(1, False, None), (2, False, "rng_state_0.pth, rng_state_1.pth"), (1, True, "scaler.pt")],
)
def test_states_that_are_missing_are_named(saved, caplog, ranks, fp16, named):
    args = SimpleNamespace(world_size=ranks, fp16=fp16, deepspeed=None, save_on_each_node=False, process_index=0)
    resume.name_missing_states(str(saved("full") / "checkpoint-2"), args)
    assert named in caplog.text if named else not caplog.text


def test_a_fresh_optimizer_is_no_secret(world, saved, tmp_path, caplog):
    shutil.copytree(saved("full") / "checkpoint-2", tmp_path / "checkpoint-2")
    content = json.loads((tmp_path / "checkpoint-2" / resume.RUN_FILE).read_text())
    (tmp_path / "checkpoint-2" / resume.RUN_FILE).write_text(json.dumps({**content, "save_only_model": True}))
    manifest.seal(tmp_path / "checkpoint-2")
    assert resume.checkpoint_to_resume(str(tmp_path), settings(world, tmp_path))
    assert "holds no state of the optimizer (--save_only_model)" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Finished folders without checkpoints
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    """The result of a finished run, whose checkpoints were deleted to free the space."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(saved("full"), folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


def test_a_finished_folder_without_checkpoints_is_recognised(world, finished, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.setattr(run, "build_student", None)  # nothing is loaded
    assert tiny.run(world, output=finished, **{**RUN, "save_strategy": "no"}) is None
    assert "holds the result of this command, trained to its end" in caplog.text
    assert run.run_process(tiny.flags(world, output=finished, **RUN)) == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("anyway", [False, True])
def test_it_is_not_replaced_by_a_changed_command(world, finished, anyway):
    before = (finished / "model.safetensors").read_bytes()
    message = "(?s)the result of a finished run with other settings:.*learning_rate: 0.001 there, 0.01 in this command"
    with pytest.raises(CheckpointError, match=message):
        tiny.run(world, output=finished, **RUN, learning_rate=1e-2, resume_anyway=anyway)
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "damaged", ["trainer_state.json", "model.safetensors", "config.json", "compodistill_run.json"]
)
def test_a_result_that_is_not_whole_is_none(world, finished, tmp_path, damaged):
    shutil.copytree(finished, tmp_path / "out")
    assert resume.is_finished(str(tmp_path / "out"), settings(world, tmp_path))
    cut(tmp_path / "out" / damaged)
    assert not resume.is_finished(str(tmp_path / "out"), settings(world, tmp_path, learning_rate=1e-2))


def test_a_run_that_was_not_at_its_end_is_not_finished(world, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    (tmp_path / "out" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 2}))
    assert not resume.is_finished(str(tmp_path / "out"), settings(world, tmp_path))
