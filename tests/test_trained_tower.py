"""A vision encoder that is trained with the student: its gradients, its checkpoints, what goes on from them."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_weights, killed_and_resumed, trained_weights
from factory import make_batch, make_model, save_tower
from safetensors.torch import load_file, save_file
from test_checkpoint import space_needed, space_options

from llava_compodistill.errors import CheckpointError
from llava_compodistill.hosts.llava import register, registration
from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.loader import load_model
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.hosts.llava.trained_towers import train_tower
from llava_compodistill.train import checkpoint

register()

FULL = {"stage": "sft", "teacher_model_path": None, "unfreeze_mm_vision_tower": True}
SWITCH = {"method": "switch_kd", "unfreeze_mm_vision_tower": True}


@pytest.fixture(scope="module")
def trained(world, mixed, tmp_path_factory):
    """(trainer, folder) of an SFT run that has trained the encoder, too; each is trained once."""
    root = tmp_path_factory.mktemp("trained")
    made = {}

    def make(family="siglip", student="qwen-student", **changes):
        key = family, student
        if key not in made:
            tower = world["siglip"] if family == "siglip" else save_tower(root / "clip", "clip", pixels=42, patches=9)
            options = {"mm_projector_type": "mlp2x_gelu", "vision_tower": tower, "data_path": mixed}
            options |= {"model_name_or_path": world[student], "unfreeze_mm_vision_tower": True, **changes}
            folder = root / f"llava-{student}-{family}"
            made[key] = tiny.run(world, "sft", folder, **options), folder
        return made[key]

    return make


def tower_of(model):
    return llava_core(model).get_vision_tower()


def pixels_for(model):
    size = tower_of(model).config.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model):
    with torch.no_grad():
        return tower_of(model)(pixels_for(model).to(tower_of(model).dtype))


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_what_the_features_use_is_trained_and_nothing_else(tmp_path, family, layer):
    tower = save_tower(tmp_path / "tower", family)
    model = make_model(tower, dtype=torch.float32, unfreeze_mm_vision_tower=True, mm_vision_select_layer=layer)
    images = make_batch(["Iqa"], dtype=torch.float32).inputs["images"]
    assert not tower_of(model)(images).requires_grad
    train_tower(tower_of(model))
    tower_of(model)(images).square().sum().backward()
    for name, parameter in tower_of(model).named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    met = {name for name, parameter in tower_of(model).named_parameters() if parameter.requires_grad}
    depth = {-1: 3, -2: 2, 1: 1}[layer]
    assert {name.split("layers.")[1][0] for name in met if "layers." in name} == set(map(str, range(depth)))
    assert any("patch_embedding" in name for name in met)
    with torch.no_grad():
        assert torch.equal(torch.cat(tower_of(model)([images[0]])), tower_of(model)(images[:1]))


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_the_encoder_is_trained_saved_and_loaded(trained, world, family):
    trainer, folder = trained(family)
    tower = tower_of(trainer.model)
    base = load_file(tower.vision_tower_name + "/model.safetensors")
    base = {name.removeprefix("vision_model."): value for name, value in base.items()}
    for name, parameter in tower.named_parameters():
        start = base[name.removeprefix("vision_tower.vision_model.")]
        # The gradient of a key's bias is nothing but rounding.
        assert torch.equal(parameter, start) != parameter.requires_grad or "k_proj.bias" in name, name
    saved = load_file(folder / "model.safetensors")
    names = {name for name in saved if "vision_tower" in name}
    assert names == {f"model.vision_tower.{name}" for name, _ in tower.named_parameters()}
    assert all(name.startswith("model.vision_tower.vision_tower.vision_model.") for name in names), "LLaVA's names"
    assert json.loads((folder / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    _, loaded, processor, _ = import_llava("llava.model.builder").load_pretrained_model(
        str(folder), None, folder.name, device="cpu"
    )
    assert torch.equal(features(loaded), features(trainer.model))
    assert processor.crop_size["height"] == tower.config.image_size


def test_llavas_original_loader_reads_it(trained):
    """Unwrapped LLaVA, registered for the tower's class alone; it works in half precision."""
    original = registration._originals["llava.model.builder", "load_pretrained_model"]
    trainer, folder = trained("clip", "llama")
    _, loaded, _, _ = original(str(folder), None, "llava-llama", device="cpu", device_map="cpu")
    saved = tower_of(trainer.model).state_dict()
    for name, value in tower_of(loaded).state_dict().items():
        if "position_ids" not in name:
            assert torch.equal(value, saved[name].half()), name


def test_a_frozen_run_keeps_an_encoder_that_was_trained(trained, world, mixed, tmp_path):
    """And with a teacher, each encodes the images itself."""
    trainer, folder = trained()
    before = features(trainer.model)
    options = {"model_name_or_path": folder, "data_path": mixed, "learning_rate": 1e-2}
    next_stage = tiny.run(world, "sft", tmp_path / "sft", bf16=True, **options)
    assert not any(parameter.requires_grad for parameter in tower_of(next_stage.model).parameters())
    assert torch.equal(features(load_model(str(tmp_path / "sft"))), before), "not rounded either"
    lora = tiny.run(world, "sft", tmp_path / "lora", lora_enable=True, lora_r=4, **options)
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    assert torch.equal(features(load_model(str(tmp_path / "lora"))), before)
    assert torch.equal(features(lora.model), before)


@pytest.mark.once
def test_a_student_with_an_encoder_of_its_own_shares_none(trained, dft, world):
    _, folder = trained()
    trainer, _ = dft(model_name_or_path=folder, method="kd", max_steps=1)
    pair = trainer.objective.pair
    assert not pair.shares_encoder and not pair.trains_encoder
    assert tower_of(pair.teacher) is not tower_of(trainer.model)
    assert not torch.equal(features(pair.teacher), features(trainer.model))


def test_a_teacher_with_an_encoder_of_its_own(trained, dft, world):
    """As LLaVA-1.6 has: the student sees through the encoder's folder, the teacher through its own weights."""
    _, folder = trained(student="qwen-teacher")
    trainer, _ = dft(teacher_model_path=folder, method="kd", max_steps=1)
    assert not trainer.objective.pair.shares_encoder
    assert not torch.equal(features(trainer.objective.teacher), features(trainer.model))
    with pytest.raises(ValueError, match="TAF fetches .* the teacher has trained that"):
        dft("taf", teacher_model_path=folder, mm_projector_type="taf")


def test_weights_are_saved_under_llavas_names(trained, tmp_path):
    """transformers 5 gives weights back the names they had: under ZeRO-3, which remembers every rule that it has, with
    one `vision_model` too many."""
    conversion_mapping = pytest.importorskip("transformers.conversion_mapping")
    trainer, folder = trained()
    model = load_model(str(folder))
    model._weight_conversions = conversion_mapping.get_model_conversion_mapping(model)
    assert model._weight_conversions
    checkpoint.save(model, str(tmp_path), trainer.args)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_the_disk_has_to_hold_the_encoder(trained, monkeypatch, tmp_path):
    model = trained()[0].model
    needed = space_needed(model, space_options(tmp_path, stage="sft", save_strategy="no"), monkeypatch)
    assert needed == sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.once
def test_a_checkpoint_without_the_weights_it_announces(trained, tmp_path):
    shutil.copytree(trained()[1], tmp_path / "llava-broken")
    path = tmp_path / "llava-broken" / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "vision_tower" not in name}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="lacks .* weights of a LlavaQwen2ForCausalLM, such as model.vision_tower"
    ):
        load_model(str(tmp_path / "llava-broken"))


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.once
def test_a_frozen_checkpoint_can_be_unfrozen_and_has_a_rate_of_its_own(dft, tmp_path, world):
    dft("frozen", **{**FULL, "unfreeze_mm_vision_tower": None})
    assert "unfreeze_mm_vision_tower" not in json.loads((tmp_path / "frozen" / "config.json").read_text())
    options = {**FULL, "model_name_or_path": tmp_path / "frozen"}
    still, _ = dft("still", mm_vision_tower_lr=0, **options)
    start = features(load_model_with_tower(tmp_path / "frozen"))
    assert torch.equal(features(still.model), start)
    moved, _ = dft("moved", mm_vision_tower_lr=1e-3, **options)
    assert not torch.equal(features(moved.model), start)
    rates = {
        name: group["initial_lr"]
        for group in moved.optimizer.param_groups
        for name, parameter in moved.model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert {rates[name] for name in rates if "vision_tower" in name} == {1e-3}
    assert rates.keys() == {name for name, p in moved.model.named_parameters() if p.requires_grad}


def load_model_with_tower(folder):
    model = load_model(str(folder))
    tower_of(model).load_model()
    return model


@pytest.mark.invariant
def test_switch_kd_accumulated_or_checkpointed_is_the_same(dft):
    """And samples without an image go along."""
    options = {**PLAIN, **SWITCH, "max_steps": 2}
    whole, expected = dft("whole", per_device_train_batch_size=4, **options)
    parts, found = dft("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    saving, saved = dft("saving", per_device_train_batch_size=4, gradient_checkpointing=True, **options)
    for step, theirs in enumerate(expected):
        for name in ("loss", "lm", "align", "switch"):
            for ours in (found[step], saved[step]):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-6), name
        assert "kl" not in theirs
    assert expected[0]["switch"] < 1e-6 < 1e-5 < expected[1]["switch"], "at first both have one encoder"
    weights = trained_weights(whole.model)
    assert any("vision_tower" in name for name in weights)
    assert_same_weights(trained_weights(parts.model), weights, 2e-5)
    assert_same_weights(trained_weights(saving.model), weights, 1e-6)


@pytest.mark.once
def test_switch_kd_resumes_as_if_it_had_not_been_killed(dft, monkeypatch):
    options = {**SWITCH, "max_steps": 4, "mm_vision_tower_lr": 5e-4}
    unbroken, _ = dft("unbroken", **options)
    resumed, _ = killed_and_resumed(dft, monkeypatch, **options)
    expected = trained_weights(unbroken.model)
    assert_same_weights(trained_weights(resumed.model), expected, 0)


@pytest.mark.once
def test_taf_passes_gradients_to_an_encoder_that_is_trained(dft, dpt_path, sharp_teacher):
    options = {"mm_projector_type": "taf", "unfreeze_mm_vision_tower": True, "max_steps": 1}
    trainer, log = dft("taf", **options)
    tower, adapter = tower_of(trainer.model), llava_core(trainer.model).get_model().mm_projector
    assert not torch.equal(features(trainer.model), features(trainer.objective.teacher)) and log[0]["attention"] > 0
    theirs = llava_core(trainer.objective.teacher).get_model().mm_projector.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in adapter.teacher_adapter.state_dict().items())
    assert any(parameter.requires_grad for parameter in tower.parameters())


def test_switch_kd_of_the_teacher_itself_has_nothing_to_distil(dft, sharp_teacher):
    _, log = dft(model_name_or_path=sharp_teacher, max_steps=1, **SWITCH)
    assert log[0]["lm"] > 1 and log[0]["align"] < 1e-5 and log[0]["switch"] < 1e-5


@pytest.mark.once
def test_switch_kd_in_bf16_stays_near_fp32(dft):
    options = {**SWITCH, "max_steps": 2, "learning_rate": 1e-2}
    _, exact = dft("fp32", **options)
    trainer, rounded = dft("bf16", bf16=True, **options)
    assert {p.dtype for p in tower_of(trainer.model).parameters()} == {torch.float32}, "what is trained is held so"
    assert {p.dtype for p in trainer.objective.teacher.parameters()} == {torch.bfloat16}
    for step, name in ((0, "align"), (1, "align"), (1, "switch")):  # rounding moves the knee of a row
        assert rounded[step][name] == pytest.approx(exact[step][name], rel=0.2) and exact[step][name] > 1e-2


@pytest.mark.once
@pytest.mark.parametrize(
    "options, message",
    [
        ({"stage": "dpt", "version": "plain"}, "--stage dpt trains and saves the adapter alone: unfreeze"),
        ({"lora_enable": True}, "a LoRA checkpoint has no place for the encoder's weights"),
        ({"fsdp": "full_shard"}, "LLaVA keeps the encoder out of FSDP's units"),
        ({"mm_vision_tower_lr": -1}, "--mm_vision_tower_lr -1.0: cannot be negative"),
        ({"unfreeze_mm_vision_tower": None, "mm_vision_tower_lr": 1e-5}, "add --unfreeze_mm_vision_tower True"),
    ],
)
def test_what_does_not_go_together_is_refused(dft, options, message):
    with pytest.raises(ValueError, match=message):
        dft(**{"unfreeze_mm_vision_tower": True, **options})
