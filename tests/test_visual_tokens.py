"""Positions of visual tokens and answers after LLaVA's merge, against brute force."""

from __future__ import annotations

import random

import pytest
import reference
import torch
from factory import PATCHES, PIXELS, make_batch, make_model

from llava_compodistill.hosts.llava.model import count_visual_tokens
from llava_compodistill.record.merge import MergedBatch, record_merge

LAYOUTS = {
    "anywhere": ["qqIqa", "Iqaa", "qqaI", "IqIqqaqIaa", "IIqa"],
    "alone": ["I", "qIa"],
    "text only": ["qqaa", "qa"],
    "mixed": ["qqaa", "qIqqaqa", "qqqqqqqqqqqqqqqqqqqqqqqqqqqqaa", "IqaI"],
    "one": ["qIqa"],
}


@pytest.fixture(scope="module")
def model(siglip):
    return make_model(siglip, layers=2, dtype=torch.float32)


def merge(model, inputs, **changes):
    """(what the forward receives, the recorded batch) for LLaVA's arguments."""
    names = ("input_ids", "position_ids", "attention_mask", "past_key_values", "labels", "images", "image_sizes")
    arguments = [{**inputs, **changes}.get(name) for name in names]
    with record_merge(model) as recorder:
        received = model.prepare_inputs_labels_for_multimodal(*arguments)
        return received, recorder.batch


def configure(monkeypatch, model, **values):
    for name, value in values.items():
        monkeypatch.setattr(model.config, name, value, raising=False)


@pytest.mark.parametrize("limit", [None, 5, 17, 24, 40])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_positions_labels_and_masks(model, monkeypatch, layouts, padding, limit):
    configure(monkeypatch, model, tokenizer_padding_side=padding, tokenizer_model_max_length=limit)
    # The collator's side need not be the model's.
    for collated in ("right", "left"):
        batch = make_batch(LAYOUTS[layouts], dtype=torch.float32, padding=collated)
        _, found = merge(model, batch.inputs)
        samples = [reference.merge(ids, labels, first, PATCHES, limit) for ids, labels, first in batch.samples]
        length = max(len(sample.kinds) for sample in samples)
        answers, targets = [], []
        assert found.real.shape == found.labels.shape == (len(samples), length)
        for row, sample in enumerate(samples):
            shift = length - len(sample.kinds) if padding == "left" else 0
            place = [shift + position for position in range(len(sample.kinds))]
            assert found.real[row].nonzero().flatten().tolist() == place
            visual = [shift + position for position in sample.visual]
            index = found.visual_index[row].tolist()
            assert index == visual + [-1] * (len(index) - len(visual))
            assert found.visual[row].nonzero().flatten().tolist() == visual
            assert bool(found.has_image[row]) == bool(visual)
            expected = [reference.IGNORE] * length
            expected[shift : shift + len(sample.labels)] = sample.labels
            assert found.labels[row].tolist() == expected
            answers.append([shift + position for position in sample.answers])
            targets += [sample.labels[position + 1] for position in sample.answers]
        assert [row.nonzero().flatten().tolist() for row in found.answer_mask()] == answers
        assert found.answer_targets().tolist() == targets
        assert found.visual_index.shape[1] == max(len(sample.visual) for sample in samples)


def test_random_layouts(model, monkeypatch):
    draw = random.Random(0)
    for number in range(40):
        layouts = ["".join(draw.choices("Iqa", (1, 4, 2), k=draw.randint(2, 9))) for _ in range(draw.randint(1, 4))]
        limit, padding = draw.choice([None, draw.randint(3, 60)]), draw.choice(["left", "right"])
        configure(monkeypatch, model, tokenizer_padding_side=padding, tokenizer_model_max_length=limit)
        batch = make_batch(layouts, dtype=torch.float32, seed=number)
        _, found = merge(model, batch.inputs)
        for row, (ids, labels, first) in enumerate(batch.samples):
            sample = reference.merge(ids, labels, first, PATCHES, limit)
            shift = found.real.shape[1] - len(sample.kinds) if padding == "left" else 0
            index = [position - shift for position in found.visual_index[row].tolist() if position >= 0]
            assert index == sample.visual, (layouts, limit, padding)


@pytest.fixture
def showing(model, monkeypatch):
    """Every visual token becomes a vector of ones and every word one of zeros, so that the merged embeddings show what
    is where, whatever LLaVA did to get there."""
    width = model.config.hidden_size
    monkeypatch.setattr(
        type(model), "encode_images", lambda self, images: torch.ones(len(images), PATCHES, width), raising=True
    )
    with torch.no_grad():
        before = model.model.embed_tokens.weight.clone()
        model.model.embed_tokens.weight.zero_()
        model.model.image_newline = torch.nn.Parameter(torch.ones(width))
        yield model
        model.model.embed_tokens.weight.copy_(before)
    del model.model.image_newline


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["flat", "spatial_unpad", "tiles"])
def test_any_resolution_tiles(showing, monkeypatch, kind, padding):
    """Images of several tiles, as many as the image's shape calls for, some padding cut away again."""
    model = showing
    configure(
        monkeypatch,
        model,
        tokenizer_padding_side=padding,
        tokenizer_model_max_length=120,
        mm_patch_merge_type="flat" if kind == "tiles" else kind,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS]],
    )
    batch = make_batch(["qIqa", "Iqqa", "qqaa", "qqqI"], dtype=torch.float32)
    tiles = [3, 5, 1, 2] if kind != "spatial_unpad" else [3, 5, 1, 3]
    images = [torch.zeros(count, 3, PIXELS, PIXELS) for count in tiles]
    sizes = [(40, 100), (100, 90), (10, 10), (80, 30)]
    received, found = merge(model, batch.inputs, images=images, image_sizes=sizes)
    embeds = received[4]
    assert torch.equal(embeds.abs().sum(dim=-1) > 0, found.visual)
    counts = found.visual.sum(dim=1).tolist()
    if kind != "spatial_unpad":
        assert counts == [3 * PATCHES, 5 * PATCHES, 0, 2 * PATCHES]
    else:
        assert len({counts[0], counts[1], counts[3]}) == 3 and counts[2] == 0
    if padding == "right":
        expected = batch.inputs["labels"][1][batch.inputs["labels"][1] != reference.IGNORE]
        assert found.labels[1][found.labels[1] != reference.IGNORE].tolist() == expected.tolist()


def test_what_the_forward_receives(model, monkeypatch):
    batch = make_batch(LAYOUTS["mixed"], dtype=torch.float32)
    for side in ("right", "left"):
        configure(monkeypatch, model, tokenizer_padding_side=side)
        (ids, positions, mask, cache, embeds, labels), found = merge(model, batch.inputs)
        assert ids is None and positions is None and cache is None and labels is None
        assert embeds.shape[:2] == found.real.shape
        # Real rows see no padding on the right, so the fused kernels can do without a mask; on the left they do.
        assert mask is None if side == "right" else torch.equal(mask.bool(), found.real)


def test_no_mask_and_no_labels(model):
    batch = make_batch(["IqaI"], dtype=torch.float32)
    _, expected = merge(model, batch.inputs)
    _, found = merge(model, batch.inputs, attention_mask=None, labels=None)
    assert torch.equal(found.visual_index, expected.visual_index) and torch.equal(found.real, expected.real)
    assert (found.labels == reference.IGNORE).all() and not found.answer_mask().any()
    assert found.answer_targets().tolist() == []


@pytest.mark.parametrize("padding", ["right", "left"])
def test_no_images_at_all(model, padding):
    """LLaVA then merges nothing, and the padding stays as the caller made it, whatever the config says."""
    batch = make_batch(["qqqaa", "qa"], dtype=torch.float32, padding=padding)
    received, found = merge(model, batch.inputs, images=None)
    assert torch.equal(received[0], batch.inputs["input_ids"]) and received[4] is None and received[5] is None
    assert torch.equal(found.labels, batch.inputs["labels"])
    assert torch.equal(found.real, batch.inputs["attention_mask"])
    assert found.visual_index.shape == (2, 0) and not found.has_image.any() and not found.visual.any()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([batch.samples[1][0]]), use_cache=False).logits[0]
        with record_merge(model):
            padded = model(**{**batch.inputs, "images": None}, use_cache=False).logits[1]
    torch.testing.assert_close(padded[batch.inputs["attention_mask"][1]], alone, atol=2e-5, rtol=1e-4)


def test_labels_that_look_like_the_mark_are_impossible():
    """-101, the mark of ignored labels during the merge, is neither a token nor LLaVA's IMAGE_TOKEN_INDEX."""
    from llava_compodistill.hosts.llava import model as visual_tokens

    assert visual_tokens._MARKED < 0 and visual_tokens._MARKED not in (reference.IGNORE, reference.IMAGE)


def test_attention_rows():
    ignore = reference.IGNORE
    #          q        I       I       q       a       a      pad
    labels = [[ignore, ignore, ignore, ignore, 7, 8, ignore], [ignore, 5, 6, ignore, ignore, ignore, ignore]]
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    batch = MergedBatch(torch.tensor(labels), real, torch.tensor([[1, 2], [4, -1]]))

    def rows(which):
        return [row.nonzero().flatten().tolist() for row in batch.attention_rows(which)]

    assert rows("all") == [[1, 2, 3, 4, 5], [4, 5, 6]]
    assert rows("answer") == [[3, 4], []]  # in the second sample the answer is over before the image
    assert rows("text") == [[3, 4, 5], [5, 6]]
    assert rows("visual") == [[1, 2], [4]]
    with pytest.raises(ValueError, match="'some': must be all, answer, labelled, text or visual"):
        rows("some")


def test_answers_are_shifted_by_one():
    labels = torch.tensor([[9, reference.IGNORE, 3, 4], [reference.IGNORE] * 3 + [5]])
    batch = MergedBatch(labels, torch.ones(2, 4, dtype=torch.bool), torch.empty(2, 0, dtype=torch.long))
    # The label at position 0 is predicted by nothing; the last position predicts nothing.
    assert batch.answer_mask().tolist() == [[False, True, True, False], [False, False, True, False]]
    assert batch.answer_targets().tolist() == [3, 4, 5]


def test_count_visual_tokens(model):
    assert count_visual_tokens(model) == PATCHES
