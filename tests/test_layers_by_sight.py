"""Training on layers that are chosen by sight, and runs that go on with what was measured before their first step."""

from __future__ import annotations

import json
import logging
import math
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, trained_weights
from factory import make_model, save_tower

from llava_compodistill.errors import NonFiniteLossError
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.pair.sight import LayerSight
from llava_compodistill.record.merge import record_merge
from llava_compodistill.record.sight import without_sight
from llava_compodistill.train import calibration, resume, trainer
from llava_compodistill.train.calibration import Batches, Calibration, samples_with_image
from llava_compodistill.train.objective import Objective
from miniature import weights
from miniature.dataset import WorldConfig, write_dataset

pytestmark = pytest.mark.invariant

BOTH = {"student_layers": "sight", "teacher_layers": "sight"}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The miniature's data and stored models: a teacher that has learned to read the image, in layer 3 of 8."""
    if not weights.have_stored_weights():
        pytest.skip("no stored weights")
    root = tmp_path_factory.mktemp("seeing")
    write_dataset(root / "data", WorldConfig.preset("smoke"), progress=False)
    weights.install(root / "models")
    return {"data": root / "data", **{name: root / "models" / name for name in weights.FOLDERS}}


@pytest.fixture
def distil(seeing, tmp_path):
    """Run DFT from a base student, or from a copy of the teacher; returns (trainer, log)."""

    def run(name="dft", reading=False, **changes):
        values = {
            "teacher_model_path": seeing["llava-teacher"],
            "model_name_or_path": seeing["llava-teacher" if reading else "qwen-student"],
            "mm_projector_type": None if reading else "mlp2x_gelu",
            "version": "qwen_qa",
            "model_max_length": 1024,
            "calibration_samples": 32,
            "sight_share": 0.8,
            "per_device_train_batch_size": 4,
            **BOTH,
            **changes,
        }
        found = tiny.run(seeing, "dft", tmp_path / name, **values)
        return found, tiny.read_log(tmp_path / name)

    return run


def recorded(folder):
    return json.loads((folder / "calibration.json").read_text())["found"]["attention"]


def term_of(run):
    return run.objective.term("attention")


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def cost_of(model, inputs, layers):
    """Of one sample, from whole logits."""
    with record_merge(model) as recorder, without_sight(model, layers, lambda: recorder.batch):
        logits = model(**inputs, use_cache=False).logits[recorder.batch.answer_mask()]
    return float(torch.nn.functional.cross_entropy(logits, recorder.batch.answer_targets()))


def test_the_layers_where_the_teacher_reads_are_aligned(distil, tmp_path, caplog):
    caplog.set_level(logging.INFO, "llava_compodistill")
    run, log = distil(max_steps=1)
    term, found = term_of(run), recorded(tmp_path / "dft")
    assert term.student_layers == found["student_layers"] == [2] and term.groups == [[3]], "at equal depth"
    assert found["teacher_layers"] == [3] and log[0]["attention"] > 0
    sight = LayerSight(*(tuple(found["sight"]["teacher"][name]) for name in ("nats", "errors")), 32)
    assert found["sight"]["teacher"]["samples"] == 32
    others = [nats for layer, nats in enumerate(sight.above_noise()) if layer != 3]
    assert sight.above_noise()[3] > 0.3 and max(others) < 0.2 * sight.nats[3]
    assert not any(LayerSight(**found["sight"]["student"]).above_noise())
    data, teacher = run.train_dataset, run.objective.teacher
    chosen = samples_with_image(data, 32, run.args.seed_of_data)
    assert len({data.list_data_dict[index]["image"] for index in chosen}) == 32 and max(chosen) > len(data) / 2
    costs = []
    for index in chosen:
        inputs = run._batch([data[index]])
        inputs.pop("use_cache")
        costs.append(cost_of(teacher, inputs, [3]) - cost_of(teacher, inputs, []))
    assert sight.nats[3] == pytest.approx(mean(costs), rel=1e-3)
    assert sight.errors[3] == pytest.approx(stdev(costs) / math.sqrt(32), rel=1e-3)
    assert "the student does not read the image yet" in caplog.text
    assert "Measuring the sight of the teacher's 8 layers: 72 forwards." in caplog.text
    assert "(32 samples, 72 forwards, " in caplog.text
    assert f", 3: {sight.nats[3]:.4f} ± {sight.errors[3]:.4f}, 4: " in caplog.text
    assert caplog.text.count("L_ADL (group): 2 <- [3]") == 1


def test_either_model_alone(distil, tmp_path):
    """A student that reads, too: it is the teacher."""
    run, _ = distil("teacher", student_layers="1,2", max_steps=1)
    assert (term_of(run).student_layers, term_of(run).groups) == ([1, 2], [[2], [3]])
    assert recorded(tmp_path / "teacher")["sight"].keys() == {"teacher"}
    run, _ = distil("student", reading=True, teacher_layers="2,3,4", max_steps=1)
    assert (term_of(run).student_layers, term_of(run).groups) == ([3], [[2, 3, 4]])
    assert recorded(tmp_path / "student")["sight"].keys() == {"student"}


@pytest.mark.parametrize(
    "options",
    [
        {"layer_matching": "adaptive"},
        {"layer_matching": "simple", "lora_enable": True, "lora_r": 4, "lora_dropout": 0.1},
        {"attention_heads": "matched", "gradient_checkpointing": True},
        {"bf16": True, "attn_implementation": "eager"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.long
def test_layers_come_first_then_distances_and_heads(distil, tmp_path, options):
    """A share of 1 takes in the third layer, too."""
    options = {"sight_share": 1.0, "calibration_samples": 64, "max_steps": 1, **options}
    run, log = distil(reading="lora_enable" not in options, **options)
    term, found = term_of(run), recorded(tmp_path / "dft")
    layers = found["teacher_layers"]
    assert len(layers) > 1 and layers == list(range(3, 3 + len(layers)))
    assert found["student_layers"] == term.student_layers and len(term.student_layers) <= len(layers)
    assert all(set(group) <= set(layers) for group in term.groups)
    if options.get("layer_matching") == "adaptive":
        assert [len(row) for row in found["distances"]] == [len(layers)] * len(term.student_layers)
    if "attention_heads" in options:
        heads = range(llava_core(run.model).config.num_attention_heads)
        assert term.assigned == [[(layer, head) for head in heads] for layer in layers]
    assert log[0]["attention"] < (1e-4 if "lora_enable" not in options and "bf16" not in options else 1)


def test_unlike_towers(distil, seeing, tmp_path):
    tower = save_tower(tmp_path / "siglip-other", patches=4, pixels=42)
    run, _ = distil(vision_tower=tower, max_steps=1)
    assert term_of(run).groups == [[3]], "the teacher reads with its own tower"


@pytest.mark.long
def test_micro_batches_and_what_was_first_in_the_data_do_not_matter(distil, seeing, tmp_path):
    records = json.loads((seeing["data"] / "instruct_student.json").read_text())
    text = [tiny.sample(number, None, 2) for number in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(text + records[:48]))
    options = {"data_path": tmp_path / "data.json", **PLAIN, "learning_rate": 1e-3, "max_steps": 2, "reading": True}
    options |= {"teacher_layers": "3,4,5"}
    whole, expected = distil("whole", **options)
    parts, found = distil("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert_same_log(found, expected)
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)
    one, other = (recorded(tmp_path / name)["sight"]["student"] for name in ("whole", "parts"))
    assert one["samples"] == other["samples"] == 32
    assert one["nats"] == pytest.approx(other["nats"], rel=1e-3, abs=1e-4)


def test_measuring_leaves_no_trace(distil, tmp_path):
    """The same layers, named: losses and weights are equal to the last bit, with dropout, too."""
    lora = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "max_steps": 2}
    measured, expected = distil("measured", **lora)
    named, found = distil("named", **lora, student_layers="2", teacher_layers="3")
    for ours, theirs in zip(found, expected, strict=True):
        assert all(ours[name] == theirs[name] for name in ("loss", "lm", "kl", "attention"))
    assert_same_weights(trained_weights(named.model), trained_weights(measured.model), 0)
    assert not (tmp_path / "named" / "calibration.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def killed_at(monkeypatch, step, run):
    original = trainer.CompoDistillTrainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.CompoDistillTrainer, "_save_checkpoint", save_and_die)
        run(save_strategy="steps", save_steps=step)


def no_second_look(monkeypatch):
    def look(*args, **kwargs):
        raise AssertionError("it is measured again")

    monkeypatch.setattr(Objective, "calibrate", look)


@pytest.mark.long
def test_a_resumed_run_keeps_its_layers(distil, tmp_path, monkeypatch, caplog):
    options = {"reading": True, "layer_matching": "adaptive", "sight_share": 1.0, "max_steps": 4}
    unbroken, expected = distil("unbroken", **options)
    killed_at(monkeypatch, 2, lambda **saving: distil("broken", **options, **saving))
    first = (tmp_path / "broken" / "checkpoint-2" / "calibration.json").read_text()
    assert json.loads(first)["found"]["attention"] == recorded(tmp_path / "unbroken")
    no_second_look(monkeypatch)
    saving = {"save_strategy": "steps", "save_steps": 2}
    resumed, found = distil("broken", **options, **saving)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)
    for folder in ("broken/checkpoint-4", "broken"):
        assert (tmp_path / folder / "calibration.json").read_text() == first
    assert distil("broken", **options, **saving)[0].state.global_step == 4, "and when it is finished"
    assert (tmp_path / "broken" / "calibration.json").read_text() == first
    (tmp_path / "broken" / "checkpoint-4" / "calibration.json").write_text(first[:50])
    assert resume.last_complete(str(tmp_path / "broken")).endswith("checkpoint-2")
    assert "calibration.json is damaged" in caplog.text


@pytest.mark.parametrize("options", [{"layer_matching": "adaptive"}, {"attention_heads": "matched"}], ids=str)
def test_a_run_resumed_with_another_micro_batch_is_not_calibrated_again(dft, tmp_path, monkeypatch, options):
    """Its first batch would be one sample, of text alone."""
    options = {**options, "calibration_batches": 1, "max_steps": 4}
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    unbroken, expected = dft("unbroken", **micro, **options)
    killed_at(monkeypatch, 2, lambda **saving: dft("broken", **micro, **options, **saving))
    saving = {"save_strategy": "steps", "save_steps": 2}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    resumed, found = dft("broken", **small, **options, **saving)
    assert term_of(resumed).groups == term_of(unbroken).groups
    if "attention_heads" in options:
        assert term_of(resumed).assigned == term_of(unbroken).assigned
    assert_same_log(found, expected)


@pytest.mark.long
def test_a_checkpoint_without_its_calibration_is_measured_on_what_the_stage_starts_from(
    distil, tmp_path, monkeypatch, caplog
):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    killed_at(monkeypatch, 1, lambda **saving: distil("broken", **{**options, **saving}))
    path = tmp_path / "broken" / "checkpoint-1" / "calibration.json"
    before = path.read_text()
    path.unlink()
    path.with_name("checkpoint_manifest.json").unlink()  # earlier releases wrote neither
    distil("broken", **options)
    assert "saved by an earlier release" in caplog.text
    assert (tmp_path / "broken" / "calibration.json").read_text() == before
    distil("broken", **{**options, "max_steps": 3}, sight_share=0.5, resume_anyway=True)
    assert "--sight_share 0.8 --calibration_samples 32. It is measured anew" in caplog.text
    assert "--sight_share 0.5" in (tmp_path / "broken" / "calibration.json").read_text()


def test_all_ranks_take_the_first_ones(distil, tmp_path, monkeypatch):
    first = {"attention": {"student_layers": [2], "teacher_layers": [3, 4], "reasons": ["of the first rank"]}}
    monkeypatch.setattr(trainer, "broadcast_object_list", lambda found: [first] if "attention" in found[0] else found)
    run, _ = distil(max_steps=1)
    assert (term_of(run).student_layers, term_of(run).groups) == ([2], [[3, 4]])
    assert recorded(tmp_path / "dft") == first["attention"]


@pytest.mark.once
@pytest.mark.long
def test_two_processes_choose_what_one_does(ranks, distil, seeing, tmp_path):
    options = {**PLAIN, "learning_rate": 1e-3, "max_steps": 2, "sight_share": 1.0, "version": "qwen_qa"}
    single, expected = distil("one", gradient_accumulation_steps=2, per_device_train_batch_size=2, **options)
    options |= {"teacher_model_path": seeing["llava-teacher"], "model_name_or_path": seeing["qwen-student"]}
    options |= {"mm_projector_type": "mlp2x_gelu", "model_max_length": 1024, "calibration_samples": 32, **BOTH}
    ranks.train_well(tiny.flags(seeing, "dft", tmp_path / "two", ddp_backend="gloo", **options), 2, tmp_path / "log")
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-5)
    assert recorded(tmp_path / "two")["teacher_layers"] == recorded(tmp_path / "one")["teacher_layers"]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        ({"sight_share": 0}, "--sight_share 0.0: must be above 0 and at most 1"),
        ({"sight_share": 1.5}, "--sight_share 1.5: must be above 0 and at most 1"),
        ({"calibration_samples": 7}, "--calibration_samples 7: must be at least 8"),
        ({"student_layers": "0,1,2,3,4,5,6"}, r"layers \[0, .*, 6\] are outside a model"),
        ({"method": "release"}, "--student_layers sight: --method release aligns the layers of the authors' code"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_weights_are_read(distil, monkeypatch, options, message):
    from llava_compodistill.train import run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(run, "load_teacher", loaded)
    with pytest.raises(ValueError, match=message):
        distil(**options)
    with pytest.raises(AssertionError, match="weights are read"):
        distil()


def test_more_student_layers_than_the_teacher_has_are_refused_before_weights_are_read(world, sharp_teacher, tmp_path):
    """A deeper student; with fewer layers than the teacher's the run is widened."""
    options = {"model_name_or_path": world["qwen-teacher"], "teacher_layers": "sight", "version": "qwen_1_5"}
    with pytest.raises(ValueError, match=r"layers \[9\] are outside a model with 6 layers"):
        tiny.run(world, "dft", tmp_path, teacher_model_path=sharp_teacher, student_layers="9", **options)


def test_a_teacher_that_does_not_read_is_refused(distil, monkeypatch):
    from llava_compodistill.hosts.llava.vision_towers import SiglipVisionTower

    forward = SiglipVisionTower.forward
    monkeypatch.setattr(SiglipVisionTower, "forward", lambda self, images: torch.zeros_like(forward(self, images)))
    with pytest.raises(ValueError, match="--teacher_layers sight: .* rises in none beyond noise"):
        distil()


def test_data_without_images_are_refused(distil, seeing, tmp_path):
    records = json.loads((seeing["data"] / "instruct_student.json").read_text())[:7]
    (tmp_path / "few.json").write_text(json.dumps(records + [tiny.sample(number, None, 2) for number in range(8)]))
    (tmp_path / "text.json").write_text(json.dumps([tiny.sample(number, None, 2) for number in range(8)]))
    for name in ("few", "text"):
        with pytest.raises(
            ValueError, match="--teacher_layers sight .*: the data have . samples with an image of their"
        ):
            distil(data_path=tmp_path / f"{name}.json")


def test_zero3_is_refused(distil, dft, monkeypatch):
    """By its mark on the weights, and before they are read by its settings."""
    original = trainer.CompoDistillTrainer._look_at_data

    def partitioned(self):
        next(self.model.parameters()).ds_id = 0
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.CompoDistillTrainer, "_look_at_data", partitioned)
        with pytest.raises(
            ValueError, match="--student_layers sight .*: this runs the student before ZeRO-3 can gather"
        ):
            distil()
        with pytest.raises(ValueError, match="--attention_heads matched .*: this runs the student before ZeRO-3"):
            dft(attention_heads="matched")
    from llava_compodistill.train import rehearsal, run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    def under_zero3(model_args, args, text):
        args.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: True)
        return rehearsal.rehearse(model_args, args, text)

    monkeypatch.setattr(run, "load_teacher", loaded)
    monkeypatch.setattr(run, "rehearse", under_zero3)
    with pytest.raises(ValueError, match="before ZeRO-3 can gather it. Use ZeRO-2"):
        distil()
    with pytest.raises(AssertionError, match="weights are read"):
        dft()


def test_a_loss_that_is_not_finite_is_no_profile(siglip):
    model = make_model(siglip, dtype=torch.float32)
    with torch.no_grad():
        llava_core(model).lm_head.weight.fill_(float("inf"))
    from factory import make_batch

    batch = make_batch(["Iqaa"] * 8, dtype=torch.float32).inputs
    objective = SimpleNamespace(pair=SimpleNamespace(student=model), calibrated_by={})
    with pytest.raises(NonFiniteLossError, match="The student's loss is not finite"):
        Calibration(objective, [], [batch]).sight("student")


def test_samples_of_a_data_set_that_does_not_say_which_have_an_image():
    assert list(samples_with_image([1, 2, 3], 2, seed=0)) == [0, 1]
    assert list(samples_with_image([1, 2, 3], 8, seed=0)) == [0, 1, 2]
    made = Batches("abcde", range(5), 2, lambda samples: {"samples": samples})
    assert [batch["samples"] for batch in made] == [["a", "b"], ["c", "d"], ["e"]] and len(made) == 3
    assert calibration.LEAST_SAMPLES == 8
