"""Taking the image from some layers' sight: what depends on it afterwards, and what does not."""

from __future__ import annotations

import factory
import pytest
import reference
import torch

from llava_compodistill import compat
from llava_compodistill.hosts.llava import register
from llava_compodistill.pair.sight import LayerSight, shortest_run
from llava_compodistill.record.attention import attention_modules
from llava_compodistill.record.merge import record_merge
from llava_compodistill.record.sight import sight_by_layer, without_sight

LAYOUTS = ["qIqqaa", "Iqa", "qqaqa", "qIqIqa"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    register()
    return factory.save_tower(tmp_path_factory.mktemp("tower"))


def hidden_states(model, batch, layers):
    """Last hidden states [B, N, D], and where the visual tokens are [B, N]."""
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    collected = []
    handle = model.get_model().norm.register_forward_hook(lambda module, args, output: collected.append(output))
    try:
        with torch.no_grad(), record_merge(model) as recorder, without_sight(model, layers, lambda: recorder.batch):
            model(**inputs, labels=batch.inputs["labels"], use_cache=False)
            merged = recorder.batch
    finally:
        handle.remove()
    visual = torch.zeros(merged.real.shape[0], merged.real.shape[1] + 1, dtype=torch.bool)
    visual.scatter_(1, merged.visual_index.where(merged.visual_index >= 0, merged.real.shape[1]), True)
    return collected[0], visual[:, :-1], merged.real


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_depends_on_the_image(tower, attention, padding):
    model = factory.make_model(tower, attention=attention, dtype=torch.float32, tokenizer_padding_side=padding)
    batch, other = (factory.make_batch(LAYOUTS, padding=padding, dtype=torch.float32) for _ in range(2))
    other.inputs["images"] = other.inputs["images"].flip(-1)
    every = list(range(4))

    def change(layers):
        (a, visual, real), (b, _, _) = (hidden_states(model, x, layers) for x in (batch, other))
        difference = (a - b).abs().amax(dim=-1)
        after_image = real & ~visual & (visual.cumsum(1) > 0)
        assert after_image.any() and visual.any()
        return difference[after_image].max().item(), difference[visual].max().item()

    text, visual = change(every)
    assert text == 0 and visual > 1e-6  # nothing of the image reaches the text; patches still mix
    for layers in ([], [0], every[1:], every[:-1]):
        assert change(layers)[0] > 1e-7  # one open layer is enough


def test_nothing_is_left_behind_and_no_layers_change_nothing(tower):
    model = factory.make_model(tower, dtype=torch.float32)
    batch = factory.make_batch(LAYOUTS, dtype=torch.float32)
    real = hidden_states(model, batch, [])[2]
    before = hidden_states(model, batch, [])[0]
    blind = hidden_states(model, batch, [1, 2])[0]
    assert (blind - before)[real].abs().max() > 1e-6
    assert torch.equal(hidden_states(model, batch, [])[0], before)
    # A mask that hides nothing gives what no mask gives: samples without an image
    torch.testing.assert_close(blind[2][real[2]], before[2][real[2]])


def test_errors(tower):
    model = factory.make_model(tower, dtype=torch.float32)
    with pytest.raises(ValueError, match="Layer 4: the model has layers 0 to 3"):
        with without_sight(model, [4], lambda: None):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# The sight of each layer
# ---------------------------------------------------------------------------------------------------------------------
# Several images and rounds; the image last, which no answer sees; text alone and no answer, which are left out.
MEASURED = ["qIqqIqaaqa", "Iqa", "qqqaa", "qqqaaI", "qIqq"]


def by_hand(model, batch):
    """Sample by sample and layer by layer, in fp64."""
    with torch.no_grad():
        features = factory.encoder_features(model, batch.inputs["images"]).double()
        weights = {name: p.double() for name, p in model.named_parameters() if "vision_tower" not in name}
        found = []
        for ids, labels, image in batch.samples:
            merged = reference.merge(ids, labels, image, factory.PATCHES)
            if not (merged.visual and merged.answers):
                continue
            whole, *blind = (
                reference.answer_cost(weights, model.config, merged, features, layer)
                for layer in (None, *range(model.config.num_hidden_layers))
            )
            found.append([cost - whole for cost in blind])
    return torch.tensor(found)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_the_sight_of_layers_is_what_the_formulas_give(tower, family, attention, padding):
    options = {"attention": attention, "dtype": torch.float32, "tokenizer_padding_side": padding}
    model = factory.make_model(tower, family, **options)
    batch = factory.make_batch(MEASURED, padding=padding, dtype=torch.float32)
    encoded = []
    handle = model.get_vision_tower().register_forward_hook(lambda *args: encoded.append(1))
    found = torch.tensor(sight_by_layer(model, [batch.inputs]))
    handle.remove()
    assert len(encoded) == 1, "once for all layers"
    expected = by_hand(model, batch)
    assert found.shape == (3, 4) and expected[:2].abs().min() > 1e-4
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-5, rtol=1e-4)
    single = [factory.make_batch(MEASURED, padding=padding, dtype=torch.float32).inputs for _ in MEASURED]
    images = [sample[2] for sample in batch.samples] + [len(batch.inputs["images"])]
    for place, inputs in enumerate(single):  # as five batches
        inputs |= {name: inputs[name][place : place + 1] for name in ("input_ids", "labels", "attention_mask")}
        inputs["images"] = inputs["images"][images[place] : images[place + 1]]
    torch.testing.assert_close(torch.tensor(sight_by_layer(model, single)), found, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("reader", range(4))
def test_a_model_that_reads_in_one_layer_chooses_that_layer(tower, reader):
    model = factory.make_model(tower, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(100.0)
        for layer, module in enumerate(attention_modules(model)):
            module.o_proj.weight.mul_(3.0 if layer == reader else 0.0)  # elsewhere nothing passes between tokens
        batch = factory.make_batch(["Iqaaa", "qIqaa", "IqIaaa", "qqIqqa"] * 16, dtype=torch.float32)
        with record_merge(model) as recorder:  # the answers are what the model says with sight
            logits = model(**batch.inputs, use_cache=False).logits
        labels = batch.inputs["labels"]
        labels[labels >= 0] = logits[recorder.batch.answer_mask()].argmax(dim=-1)
    profile = LayerSight.of(sight_by_layer(model, [batch.inputs])).above_noise()
    assert profile[reader] > 0.01 and not any(profile[:reader] + profile[reader + 1 :])
    for share in (0.1, 0.9, 1.0):
        assert shortest_run(profile, share) == [reader]


def test_a_backend_without_masks_gives_way_in_the_blind_layer_alone(tower, monkeypatch):
    """FlashAttention needs a GPU: what stands in for it refuses a mask, as it would."""
    options = {"dtype": torch.float32, "attention": "sdpa"}
    batch = factory.make_batch(MEASURED, dtype=torch.float32)
    expected = sight_by_layer(factory.make_model(tower, **options), [batch.inputs])
    model = factory.make_model(tower, **options)
    calls = []
    if compat.ALL_ATTENTION_FUNCTIONS is not None:
        sdpa = compat.ALL_ATTENTION_FUNCTIONS["sdpa"]

        def flash(module, query, key, value, attention_mask, **kwargs):
            assert attention_mask is None
            calls.append(module.layer_idx)
            return sdpa(module, query, key, value, None, **kwargs)

        monkeypatch.setitem(compat.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    else:
        from transformers.models.qwen2 import modeling_qwen2

        def flash_forward(module, hidden_states, attention_mask=None, **kwargs):
            assert attention_mask is None
            calls.append(module.layer_idx)
            return modeling_qwen2.Qwen2SdpaAttention.forward(module, hidden_states, None, **kwargs)

        monkeypatch.setattr(modeling_qwen2.Qwen2FlashAttention2, "forward", flash_forward)
        for module in attention_modules(model):
            module.__class__ = modeling_qwen2.Qwen2FlashAttention2
        model.get_model()._attn_implementation = "flash_attention_2"
    model.config._attn_implementation = "flash_attention_2"
    found = sight_by_layer(model, [batch.inputs])
    every = [0, 1, 2, 3]
    assert calls == every + sum(([other for other in every if other != layer] for layer in every), [])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert all(module.config._attn_implementation == "flash_attention_2" for module in attention_modules(model))
    assert not any("forward" in vars(module) for module in attention_modules(model))
