"""Maps brought to the tokens of a model whose tower cuts images into other patches."""

from __future__ import annotations

import pytest
import torch

from llava_compodistill.hosts.base import IGNORE_INDEX, MergedBatch
from llava_compodistill.record.resample import on_other_grid, repeated


def layout(*samples, length):
    """A merged batch from strings: I a visual token, t a token of text; padded to `length`."""
    index = [[place for place, kind in enumerate(sample) if kind == "I"] for sample in samples]
    width = max(map(len, index))
    return MergedBatch(
        labels=torch.full((len(samples), length), IGNORE_INDEX),
        real=torch.tensor([[place < len(sample) for place in range(length)] for sample in samples]),
        visual_index=torch.tensor([places + [-1] * (width - len(places)) for places in index]),
    )


def attention(batch, seed=0):
    """Random causal rows, 0 where there is nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(*batch.real.shape, batch.visual_index.shape[1], generator=generator, dtype=torch.float64)
    seen = batch.visual_index[:, None] <= torch.arange(batch.real.shape[1])[None, :, None]
    return values * (seen & (batch.visual_index >= 0)[:, None] & batch.real[:, :, None])


def test_the_same_grid_changes_nothing():
    batch = layout("tIIIItt", "ttIIIIIIIIt", "ttt", length=12)
    maps = attention(batch)
    found, known = on_other_grid(maps, batch, batch, (4, 4))
    with_image = batch.visual_index[:, 0] >= 0
    torch.testing.assert_close(found, maps)
    assert torch.equal(known, batch.real & with_image[:, None])


@pytest.mark.parametrize("images", [1, 2])
def test_a_coarser_grid_sums_the_keys_and_averages_the_queries(images):
    """16 patches to 4, against explicit matrices: blocks of two by two."""
    theirs = layout("t" + "I" * 16 * images + "ttt", length=40)
    mine = layout("t" + "I" * 4 * images + "ttt", length=40)
    maps = attention(theirs)
    blocks = torch.zeros(4, 16, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            blocks[row // 2 * 2 + column // 2, row * 4 + column] = 1
    blocks = torch.block_diag(*[blocks] * images)
    found, known = on_other_grid(maps, theirs, mine, (16, 4))
    text = [0, *range(1 + 16 * images, 4 + 16 * images)]
    rows = torch.cat([maps[0, text[:1]], blocks / 4 @ maps[0, 1 : 1 + 16 * images], maps[0, text[1:]]])
    expected = rows @ blocks.t()
    torch.testing.assert_close(found[0, : len(expected)], expected)
    assert known[0].tolist() == mine.real[0].tolist() and not found[0, len(expected) :].any()
    torch.testing.assert_close(found[0, 1 + 4 * images :].sum(), maps[0, 1 + 16 * images :].sum())


def test_a_finer_grid_keeps_what_is_uniform():
    theirs, mine = layout("tIIIItt", length=8), layout("t" + "I" * 9 + "tt", length=13)
    uniform = torch.full((1, 8, 4), 0.1, dtype=torch.float64)
    found, _ = on_other_grid(uniform, theirs, mine, (4, 9))
    torch.testing.assert_close(found[0, :12], torch.full((12, 9), 0.1 * 4 / 9, dtype=torch.float64))


def test_what_has_no_counterpart_does_not_count():
    theirs = layout("tIIIIttt", "tII", "tt", length=9)
    mine = layout("tItt", "tI", "tt", length=9)
    found, known = on_other_grid(attention(theirs), theirs, mine, (4, 1))
    assert known.sum(dim=1).tolist() == [4, 0, 0], "an image that was cut, and a text alone"
    assert not found[1:].any()
    shorter = layout("tItttttt", length=9)  # more text than the other has
    _, known = on_other_grid(attention(layout("tIIIIttt", length=9)), layout("tIIIIttt", length=9), shorter, (4, 1))
    assert known[0].tolist() == [True] * 5 + [False] * 4


def test_heads_as_samples():
    batch = layout("tIIIItt", "tIIIIt", length=7)
    twice = repeated(batch, 2)
    assert (
        twice.real.tolist() == [batch.real.tolist()[place] for place in (0, 0, 1, 1)] and repeated(batch, 1) is batch
    )
