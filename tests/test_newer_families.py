"""Qwen3 language models, and SigLIP 2 towers."""

from __future__ import annotations

import json
import shutil

import factory
import pytest
import tiny
import torch
import transformers
from checks import trained_weights
from factory import make_batch, make_model

from llava_compodistill.errors import CheckpointError
from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.language_models import MODEL_CLASSES, model_class
from llava_compodistill.hosts.llava.vision_towers import is_siglip
from llava_compodistill.record.attention import capture_visual_attention
from llava_compodistill.record.merge import record_merge

HAS_QWEN3 = hasattr(transformers, "Qwen3Config")
needs_qwen3 = pytest.mark.skipif(not HAS_QWEN3, reason="this transformers has no Qwen3")


@pytest.mark.skipif(HAS_QWEN3, reason="this transformers has Qwen3")
def test_an_older_transformers_says_what_qwen3_needs():
    assert "qwen3" not in MODEL_CLASSES
    with pytest.raises(ValueError, match="Qwen3 needs transformers 4.51 or newer, not 4.37"):
        model_class("qwen3")


@needs_qwen3
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_maps_of_qwen3_are_its_attention(siglip, backend):
    """Its queries and keys are normalised head by head before they are rotated."""
    model = make_model(siglip, "qwen3", attention=backend)
    batch = make_batch(["qIqqaa", "qqIqaqaa", "qaa"])
    with torch.no_grad(), record_merge(model) as recorder:
        with capture_visual_attention(model, [0, 2], lambda: recorder.batch) as capture:
            model(**batch.inputs, use_cache=False)
            merged = recorder.batch
        eager = make_model(siglip, "qwen3", attention="eager")
    with torch.no_grad(), record_merge(eager):
        whole = eager(**batch.inputs, use_cache=False, output_attentions=True)
    for layer in (0, 2):
        expected = whole.attentions[layer].mean(dim=1)
        for sample, index in enumerate(merged.visual_index):
            keys = index[index >= 0]
            rows = merged.attention_rows()[sample]
            found = capture.maps[layer][sample, rows][:, : len(keys)]
            torch.testing.assert_close(found, expected[sample, rows][:, keys], atol=1e-7, rtol=1e-5)


@needs_qwen3
def test_a_qwen3_student_goes_through_all_stages(world, siglip, tmp_path):
    """From base models of transformers itself to a checkpoint that LLaVA's builder loads."""
    bases = {}
    for name, layers in (("student", 4), ("teacher", 5)):
        config = transformers.Qwen3Config(
            vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(layers)
        bases[name] = tmp_path / f"qwen3-{name}"
        transformers.Qwen3ForCausalLM(config).save_pretrained(bases[name])
        for file in world["tokenizer"].iterdir():
            shutil.copy(file, bases[name])
    teacher = tmp_path / "llava-teacher"
    tiny.run(world, "sft", teacher, model_name_or_path=bases["teacher"], mm_projector_type="mlp2x_gelu")
    pair = {"model_name_or_path": bases["student"], "teacher_model_path": teacher}
    bands = {"student_layers": "1,2", "teacher_layers": "1,2,3"}
    tiny.run(world, "dpt", tmp_path / "dpt", **pair)
    trainer = tiny.run(
        world, "dft", tmp_path / "dft", pretrain_mm_mlp_adapter=tmp_path / "dpt" / "mm_projector.bin", **pair, **bands
    )
    assert tiny.read_log(tmp_path / "dft")[0]["attention"] > 0
    student = tmp_path / "llava-student"
    tiny.run(world, "sft", student, model_name_or_path=tmp_path / "dft")
    assert json.loads((student / "config.json").read_text())["model_type"] == "llava_qwen3"
    loader = import_llava("llava.model.builder").load_pretrained_model
    _, model, _, _ = loader(str(tmp_path / "dft"), None, "llava-dft", device="cpu", torch_dtype=torch.float32)
    assert type(model).__name__ == "LlavaQwen3ForCausalLM"
    loaded = dict(model.named_parameters())
    for name, value in trained_weights(trainer.model).items():
        assert torch.equal(loaded[name], value), name


def test_siglip_2_of_fixed_resolution_is_siglip(tmp_path):
    assert is_siglip("google/siglip2-so400m-patch14-384") and is_siglip("google/siglip-so400m-patch14-384")
    assert not is_siglip("openai/clip-vit-large-patch14-336")
    folder = factory.save_tower(tmp_path / "siglip2-so400m")  # its config says "siglip", as the hub's do
    assert is_siglip(str(folder))


@pytest.mark.parametrize("kind", ["hub", "folder"])
def test_a_naflex_tower_is_refused(tmp_path, kind, siglip):
    name = "google/siglip2-so400m-patch16-naflex"
    if kind == "folder":
        if not hasattr(transformers, "Siglip2VisionConfig"):
            pytest.skip("this transformers has no SigLIP 2")
        name = str(tmp_path / "tower")
        transformers.Siglip2VisionConfig().save_pretrained(name)
    with pytest.raises(CheckpointError, match="NaFlex model, whose number of visual tokens depends on the image"):
        is_siglip(name)
