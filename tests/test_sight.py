"""The sight guard: what another sample's image costs, and what is said when it costs nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import trained_weights

from llava_compodistill.errors import BlindError
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.hosts.llava.vision_towers import SiglipVisionTower
from llava_compodistill.train.sight import SightGuard, steps_between
from miniature import weights

NO_IMAGE = "the image has no influence on the loss"


@pytest.fixture(scope="module")
def seeing(distilled) -> dict:
    """Flags that go on training the stored teacher, which has learned to see."""
    if not weights.have_stored_weights():
        pytest.skip("no stored weights")
    path = distilled / "models" / "llava-teacher"
    return {"model_name_or_path": path, "version": "qwen_qa", "mm_projector_type": None, "model_max_length": 1024}


def world_of(distilled) -> dict:
    return {"data": distilled / "data", **{name: distilled / "models" / name for name in weights.FOLDERS}}


def test_a_model_that_sees_pays_for_another_image(distilled, seeing, tmp_path, caplog):
    options = {**seeing, "learning_rate": 0, "sight_steps": 1, "max_steps": 2, "per_device_train_batch_size": 4}
    trainer = tiny.run(world_of(distilled), "sft", tmp_path / "out", **options)
    for entry in tiny.read_log(tmp_path / "out"):
        assert entry["sight"] > 0.3
    assert NO_IMAGE not in caplog.text
    # The same, sample by sample, on whole logits.
    guard = SightGuard(trainer)
    found = guard.measure()
    expected = []
    for own, other in guard._batches:
        for row in range(len(own["input_ids"])):
            losses = []
            for batch in (own, other):
                inputs = {name: value[row : row + 1] for name, value in batch.items()}
                with torch.no_grad():
                    losses.append(float(llava_core(trainer.model)(**inputs, use_cache=False).loss))
            assert not torch.equal(own["images"][row], other["images"][row])
            expected.append(losses[1] - losses[0])
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4) and len(found) == trainer.args.sight_samples


def test_measuring_changes_nothing(world, tmp_path):
    runs = {}
    for name, options in {"on": {"sight_steps": 1}, "off": {"blind": "off"}}.items():
        trainer = tiny.run(world, "sft", tmp_path / name, mm_projector_type="mlp2x_gelu", max_steps=3, **options)
        runs[name] = trained_weights(trainer.model), tiny.read_log(tmp_path / name)
        assert trainer.model.training
    for name, value in runs["off"][0].items():
        assert torch.equal(runs["on"][0][name], value), name
    for on, off in zip(runs["on"][1], runs["off"][1], strict=True):
        assert on["lm"] == off["lm"] and "sight" in on and "sight" not in off


@pytest.fixture
def blind(monkeypatch):
    """The tower gives every image the same features."""
    forward = SiglipVisionTower.forward
    monkeypatch.setattr(SiglipVisionTower, "forward", lambda self, images: torch.zeros_like(forward(self, images)))


def test_a_blind_run_is_reported_or_stopped(world, tmp_path, caplog, blind):
    options = {"mm_projector_type": "mlp2x_gelu", "sight_steps": 2, "max_steps": 4}
    tiny.run(world, "sft", tmp_path / "warn", **options)
    assert caplog.text.count(NO_IMAGE) == 2 and "Step 2: " in caplog.text and "--version" in caplog.text
    assert [entry.get("sight") for entry in tiny.read_log(tmp_path / "warn")] == [None, 0, None, 0]
    with pytest.raises(BlindError, match=f"Step 2: {NO_IMAGE}.*--blind warn goes on"):
        tiny.run(world, "sft", tmp_path / "error", blind="error", **options)
    caplog.clear()
    tiny.run(world, "sft", tmp_path / "off", blind="off", **options)
    assert NO_IMAGE not in caplog.text


def test_nothing_is_measured_without_images(world, tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([tiny.sample(number, None, 2) for number in range(4)]))
    options = {"mm_projector_type": "mlp2x_gelu", "sight_steps": 1, "blind": "error", "data_path": path}
    tiny.run(world, "sft", tmp_path / "out", **options)
    assert all("sight" not in entry for entry in tiny.read_log(tmp_path / "out"))


@pytest.mark.parametrize(
    ("micro", "accumulation", "ranks", "samples", "steps"),
    [(16, 8, 1, 16, 200), (2, 5, 1, 16, 200), (1, 2, 1, 16, 1000), (4, 1, 1, 64, 2000), (1, 1, 64, 16, 250)],
)
def test_small_steps_are_measured_less_often(micro, accumulation, ranks, samples, steps):
    """A measurement takes two forwards a sample, and so does a step of PT: forward, and backward without weights."""
    args = SimpleNamespace(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        world_size=ranks,
        sight_samples=samples,
    )
    assert steps_between(args) == steps
    forwards = 2 * max(samples, 2 * ranks), 2 * micro * accumulation * ranks
    assert forwards[0] < 0.01 * steps * forwards[1]


@pytest.mark.parametrize("flag, value", [("sight_steps", 0), ("sight_samples", 1)])
def test_settings_are_checked(world, tmp_path, flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}: must be at least"):
        tiny.run(world, "sft", tmp_path / "out", **{flag: value})
