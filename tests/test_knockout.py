"""Taking the image from some layers' sight: what depends on it afterwards, and what does not."""

from __future__ import annotations

import factory
import pytest
import torch

from llava_compodistill.hosts.llava import register
from llava_compodistill.record.merge import record_merge
from llava_compodistill.record.sight import without_sight

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
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask"):
        with without_sight(model, [1], lambda: None):
            pass
