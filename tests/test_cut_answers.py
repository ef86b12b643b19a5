"""A sample whose answers --model_max_length cuts off entirely adds nothing to the loss, and says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
from transformers import AutoTokenizer

from llava_compodistill.train import run as train
from llava_compodistill.train.data import CheckedDataset

FIRST, SUMMARY = "leaves no answer to learn from", "left no answer to learn from"
SHORT, LONG = "What color is the square?", " ".join(["What color is the square?"] * 3)


def record(number: int, question: str, image: str | None) -> dict:
    marker = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": marker + question}, {"from": "gpt", "value": "Red"}]
    return {"id": number, "conversations": turns, **({} if image is None else {"image": image})}


@pytest.fixture
def image(world) -> str:
    folder = world["data"] / "images"
    return str(next(iter(sorted(folder.rglob("*.png")))).relative_to(folder))


@pytest.fixture
def limit(world) -> int:
    """Enough for the short question with its image, and for the long one alone, but not with an image."""
    from llava_compodistill.hosts.llava.templates import QWEN

    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]))
    vision = json.loads((world["siglip"] / "config.json").read_text())
    patches = (vision["image_size"] // vision["patch_size"]) ** 2

    def length(question):
        turns = f"{QWEN.roles[0]}{question}{QWEN.sep}{QWEN.roles[1]}Red{QWEN.sep}"
        return len(tokenizer(QWEN.system + QWEN.sep + turns).input_ids)

    limit = length(LONG) + 2
    assert length(SHORT) + patches + 3 < limit < length(LONG) + patches - 5
    return limit


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def warnings(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_it_is_announced_once_and_counted(world, image, limit, tmp_path, caplog, kind, accumulation):
    # Without its image the long question would fit, and does.
    cut = record(9, LONG, image) if kind == "image" else record(9, LONG + LONG, None)
    fitting = [record(0, SHORT, image), record(1, SHORT, image), record(2, LONG, None)]
    data = write(tmp_path / "data.json", [*fitting, cut])
    options = {"data_path": data, "model_max_length": limit, "mm_projector_type": "mlp2x_gelu"}
    options |= {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = tiny.run(world, "sft", tmp_path / "out", max_steps=4, **options)  # two epochs
    (first,) = warnings(caplog.text, FIRST)
    assert f"--model_max_length {limit} " in first and "1 of the 2 samples of step " in first
    step = int(first.split(" samples of step ")[1].split(":")[0])
    assert step in (1, 2), "not before the end of the first epoch"
    (last,) = warnings(caplog.text, SUMMARY)
    assert f"--model_max_length {limit} " in last and "in 2 of the 8 samples" in last
    assert caplog.text.index(FIRST) < caplog.text.index(SUMMARY)
    assert trainer.state.global_step == 4


def test_nothing_is_said_where_every_sample_keeps_an_answer(world, image, limit, tmp_path, caplog):
    """Also of one that loses its last answer only, of padding, and of samples that are evaluated, not trained on."""
    partly = record(1, SHORT, image)
    partly["conversations"] += record(1, LONG, None)["conversations"]
    data = write(tmp_path / "data.json", [record(0, SHORT, None), partly])
    held_out = write(tmp_path / "held_out.json", [record(2, LONG, image)] * 2)
    original = train.make_data_module

    def with_evaluation(tokenizer, data_args, *more):
        module = original(tokenizer, data_args, *more)
        return {**module, "eval_dataset": CheckedDataset(str(held_out), tokenizer, data_args)}

    options = {"data_path": data, "model_max_length": limit, "mm_projector_type": "mlp2x_gelu"}
    options |= {"evaluation_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_data_module", with_evaluation)
        trainer = tiny.run(world, "sft", tmp_path / "out", **options)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not warnings(caplog.text, FIRST) and not warnings(caplog.text, SUMMARY)


@pytest.mark.once  # one sum over ranks
@pytest.mark.long
def test_the_summary_counts_over_all_processes(world, image, limit, tmp_path):
    data = write(tmp_path / "data.json", [record(0, SHORT, image)] * 2 + [record(1, LONG, image)] * 2)
    flags = tiny.flags(
        world, "sft", tmp_path / "out", data_path=data, model_max_length=limit, mm_projector_type="mlp2x_gelu",
        per_device_train_batch_size=1, ddp_backend="gloo",
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "llava_compodistill.train", *flags]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    (last,) = warnings(done.stderr, SUMMARY)
    assert "in 2 of the 4 samples" in last
