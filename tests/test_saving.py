"""How often a run saves, and what it says about that before the first step."""

from __future__ import annotations

import json
import logging

import pytest
import tiny


@pytest.mark.parametrize(
    ("saving", "message"),
    [
        (
            {"save_strategy": "steps", "save_steps": 0.3},
            "every 2 of 5 steps (--save_steps 0.3): a kill loses at most 2",
        ),
        ({"save_strategy": "steps", "save_steps": 3}, "every 3 of 5 steps (--save_steps 3): a kill loses at most 3"),
        (
            {"save_strategy": "steps", "save_steps": 50000},
            "No checkpoint before the last of 5 steps (--save_steps 50000)",
        ),
        ({"save_strategy": "no"}, "No checkpoint before the last of 5 steps (--save_strategy no)"),
    ],
)
def test_the_cost_of_a_kill_is_announced(world, tmp_path, caplog, saving, message):
    with caplog.at_level(logging.INFO, logger="llava_compodistill.train.run"):
        tiny.run(world, "pt", tmp_path / "run", mm_projector_type="mlp2x_gelu", max_steps=5, **saving)
    announced = [record.getMessage() for record in caplog.records if "a kill loses" in record.getMessage()]
    assert len(announced) == 1 and message in announced[0]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_share_of_the_run_counts_all_epochs_and_a_finished_run_stays_finished(world, tmp_path, caplog, epochs):
    """The scripts' default is a share of the run. Where the last checkpoint is the run's last step, the same command
    trains nothing more."""
    records = json.loads((world["data"] / "pretrain.json").read_text())[:8]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    settings = {"mm_projector_type": "mlp2x_gelu", "data_path": tmp_path / "captions.json", "max_steps": None}
    settings |= {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 0.25, "save_total_limit": 1}
    with caplog.at_level(logging.INFO, logger="llava_compodistill.train.run"):
        tiny.run(world, "pt", tmp_path / "run", **settings)
    steps = 4 * epochs
    assert f"A checkpoint every {epochs} of {steps} steps (--save_steps 0.25)" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    weights = (tmp_path / "run" / "mm_projector.bin").read_bytes()
    again = tiny.run(world, "pt", tmp_path / "run", **settings)
    assert again.state.global_step == steps
    assert (tmp_path / "run" / "mm_projector.bin").read_bytes() == weights
