"""What turns an image into visual tokens: vision towers and the TAF adapter, built from the config."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import factory
import pytest
import torch
from transformers import AutoConfig

from llava_compodistill.hosts.llava import register

register()

from llava_compodistill.hosts.llava.loader import load_model  # noqa: E402
from llava_compodistill.hosts.llava.vision_towers import SiglipVisionTower  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers
# ---------------------------------------------------------------------------------------------------------------------
def tower_config(path, **changes):
    return SimpleNamespace(**{"mm_vision_tower": str(path), "mm_vision_select_layer": -2, **changes})


def build_tower(path, **changes):
    return sys.modules["llava.model.llava_arch"].build_vision_tower(tower_config(path, **changes))


def test_siglip_gives_every_patch(siglip):
    from transformers import SiglipVisionModel

    tower = build_tower(siglip)
    assert type(tower) is SiglipVisionTower
    pixels = torch.rand(2, 3, factory.PIXELS, factory.PIXELS)
    with torch.no_grad():
        expected = SiglipVisionModel.from_pretrained(siglip)(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, factory.PATCHES, factory.WIDTH)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(tower(list(pixels))), expected, atol=1e-5, rtol=1e-5)
    assert tower.num_patches == factory.PATCHES and tower.num_patches_per_side == 4
    assert tower.hidden_size == factory.WIDTH and tower.image_processor.crop_size == {"height": 56, "width": 56}
    assert not any(p.requires_grad for p in tower.parameters())
    assert tower(pixels.bfloat16()).dtype == torch.bfloat16
    assert tower.dummy_feature.shape == (1, factory.WIDTH)


def test_so400m_at_384_has_729_visual_tokens(tmp_path):
    from transformers import SiglipVisionConfig

    SiglipVisionConfig(hidden_size=1152, image_size=384, patch_size=14).save_pretrained(tmp_path)
    tower = SiglipVisionTower(str(tmp_path), tower_config(tmp_path), delay_load=True)
    assert not tower.is_loaded and tower.num_patches == 729 and tower.hidden_size == 1152


def test_a_whole_siglip_folder_gives_its_vision_half(tmp_path):
    """As on the hub: google/siglip-so400m-patch14-384 holds a text model too."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(build_tower(tmp_path)(pixels), expected, atol=1e-6, rtol=1e-5)


def test_clip_still_goes_to_llavas_tower(tmp_path):
    tower = build_tower(factory.save_tower(tmp_path / "clip", "clip"))
    assert type(tower).__name__ == "CLIPVisionTower" and type(tower).__module__.startswith("llava.")
    assert tower(torch.rand(1, 3, 56, 56)).shape == (1, factory.PATCHES, factory.WIDTH), "without the class token"


def test_an_unknown_feature_selection_is_refused(siglip):
    with pytest.raises(ValueError, match="mm_vision_select_feature 'cls': must be patch or cls_patch"):
        build_tower(siglip, mm_vision_select_feature="cls")


# ---------------------------------------------------------------------------------------------------------------------
# The TAF adapter
# ---------------------------------------------------------------------------------------------------------------------
def test_taf_is_built_from_the_config_alone(checkpoints, siglip):
    teacher = load_model(str(checkpoints["llama"]))
    student = factory.make_model(siglip, "qwen2", hidden=24, heads=4, teacher=teacher, dtype=torch.float32)
    adapter = student.get_model().mm_projector
    assert adapter.student_map[0].weight.shape == (24, 32) and len(adapter.student_map) == 1
    for name, value in teacher.get_model().mm_projector.state_dict().items():
        assert torch.equal(adapter.teacher_adapter.state_dict()[name], value)
    features = torch.rand(2, 16, factory.WIDTH)
    out = adapter(features)
    expected = adapter.student_map(teacher.get_model().mm_projector(features))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(adapter(teacher.get_model().mm_projector(features), from_teacher=True), expected)
    adapter.requires_grad_(True)  # as LLaVA's own code does
    adapter(features).sum().backward()
    assert adapter.student_map[0].weight.grad is not None
    assert all(p.grad is None for p in adapter.teacher_adapter.parameters())
    features.requires_grad_()  # of an encoder that is trained
    found = torch.autograd.grad(adapter(features).sum(), features)[0]
    expected = adapter.student_map(teacher.get_model().mm_projector(features)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, features)[0])
    adapter.requires_grad_(True)
    adapter(features).sum().backward()
    assert all(p.grad is None for p in adapter.teacher_adapter.parameters())
    config = AutoConfig.from_pretrained(checkpoints["qwen2"])
    config.mm_projector_type = "taf"
    with pytest.raises(ValueError, match="the config has no `taf_teacher_projector_type`: give --teacher_model_path"):
        sys.modules["llava.model.llava_arch"].build_vision_projector(config)


def test_two_layers_of_mlp_s_and_no_chains(checkpoints):
    from llava_compodistill.hosts.llava.taf import TAFProjector, taf_config

    deep = TAFProjector(torch.nn.Linear(4, 6), 6, 5, depth=2)
    assert [type(layer).__name__ for layer in deep.student_map] == ["Linear", "GELU", "Linear"]
    assert deep(torch.rand(3, 4)).shape == (3, 5)
    with pytest.raises(ValueError, match="TAF depth 3: MLP_S has 1 or 2"):
        TAFProjector(torch.nn.Linear(4, 6), 6, 5, depth=3)
    with pytest.raises(ValueError, match="chains of TAF adapters"):
        taf_config(SimpleNamespace(mm_projector_type="taf", hidden_size=8))


def test_a_teacher_with_another_normalisation_sees_its_own_pixels(tmp_path):
    """The batch is normalised for the student's encoder; the teacher must get what its own processor would give."""
    import numpy as np

    from llava_compodistill.record.encoding import encode_separately

    student = factory.make_model(factory.save_tower(tmp_path / "siglip"))
    teacher = factory.make_model(factory.save_tower(tmp_path / "clip", "clip"), seed=1)
    image = np.random.default_rng(0).integers(0, 256, (factory.PIXELS, factory.PIXELS, 3), dtype=np.uint8)

    def prepared(model):
        processor = model.get_vision_tower().image_processor
        return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"]).double()

    with torch.no_grad():
        expected = teacher.encode_images(prepared(teacher))
        with encode_separately(student, teacher):
            found = teacher.encode_images(prepared(student))
        assert (teacher.encode_images(prepared(student)) - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_equal_normalisation_leaves_the_bits_alone(siglip):
    from llava_compodistill.pair.vision import renormalisation

    processor = build_tower(siglip).image_processor
    assert renormalisation(processor, processor) == ((1.0,) * 3, (0.0,) * 3)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_asking_for_attentions_does_not_change_what_the_encoder_gives(tmp_path, family):
    """transformers 5 hooks a tower a second time, whose "last but one" hidden state is then another layer's."""
    register()
    patches = 16
    tower = factory.save_tower(tmp_path / "tower", family, patches)
    model = factory.make_model(tower, attention="eager", dtype=torch.float32)
    batch = factory.make_batch(["qIqa"], dtype=torch.float32).inputs
    batch.pop("labels")
    with torch.no_grad():
        before = model.encode_images(batch["images"])
        for _ in range(2):
            outputs = model(**batch, use_cache=False, output_attentions=True, output_hidden_states=True)
            assert len(outputs.attentions) == 4 and len(outputs.hidden_states) == 5
        assert torch.equal(model.encode_images(batch["images"]), before)
        states = model.get_vision_tower().vision_tower(batch["images"], output_hidden_states=True).hidden_states
        assert len(states) == 4
