"""The Triton kernels in Triton's interpreter, on a CPU. test_visual_attention_triton.py runs this in another process:

TRITON_INTERPRET=1 must be set before Triton is imported, and would stay set for every other test of the process.
"""

from __future__ import annotations

import pytest
import torch
from reference import attention_probabilities
from torch.utils.checkpoint import checkpoint

from llava_compodistill.ops.visual_attention import fused, probe, visual_attention_map

# Several tiles in each direction from few tokens.
TINY = fused.TileSet(
    fused.Tiles(32, 16, 4, 1), fused.Tiles(16, 16, 4, 1), fused.Tiles(32, 16, 4, 1), fused.Tiles(16, 32, 4, 1)
)

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # NumPy on the logarithm of an empty sum


@pytest.fixture(autouse=True)
def tiny_tiles_and_dirty_memory(monkeypatch):
    """Memory that nobody has written reads as NaN."""
    monkeypatch.setattr(fused, "tiles_for", lambda *_: TINY)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def images(length, *samples):
    """[B, N_v]: the positions of each sample's images, (first, last + 1) each; -1 behind the shorter samples."""
    positions = [[p for first, end in sample for p in range(first, end)] for sample in samples]
    width = max(map(len, positions))
    assert all(p < length for sample in positions for p in sample)
    return torch.tensor([sample + [-1] * (width - len(sample)) for sample in positions])


def left_padding(length, *pads):
    return torch.arange(length)[None] >= torch.tensor(pads)[:, None]


def truth(query, key, index, key_mask=None, heads="mean"):
    """The map in float64, one sample at a time and without its left padding; differentiable."""
    batch, num_heads, length, _ = query.shape
    lead = (batch, num_heads, length)
    out = torch.zeros(*lead, index.shape[1], dtype=torch.float64, device=query.device)
    for b in range(batch):
        real = torch.arange(length, device=query.device)
        real = real if key_mask is None else real[key_mask[b]]
        probs = attention_probabilities(query[b][:, real], key[b][:, real])
        place = {position: number for number, position in enumerate(real.tolist())}
        columns = [column for column, position in enumerate(index[b].tolist()) if position in place]
        places = [place[position] for position in index[b, columns].tolist()]
        out[b][:, real[:, None], columns] = probs[:, :, places]
    return out.mean(1) if heads == "mean" else out


def run(function, query, key, index, grad, **options):
    """(map, gradient of the query, gradient of the key)"""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    out = function(query, key, index, **options)
    out.backward(grad.to(out.dtype))
    return out.detach(), query.grad, key.grad


def tensors(batch, heads, kv_heads, length, size, dtype=torch.float32, seed=0, sharpness=2.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        sharpness**0.5 * torch.randn(batch, count, length, size, generator=generator) for count in (heads, kv_heads)
    )
    return query.to(device, dtype), key.to(device, dtype)


def gradient(query, index, heads="mean", seed=1):
    lead = query.shape[:1] + query.shape[2:3] if heads == "mean" else query.shape[:3]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, index.shape[1], generator=generator, dtype=torch.float64).to(query.device)


def assert_as_accurate_as_eager(query, key, index, grad, **options):
    """|kernel - truth| <= |eager in the same dtype - truth| + one rounding, for the map and both gradients."""
    exact = run(truth, query.double(), key.double(), index, grad, **options)
    eager = run(visual_attention_map, query, key, index, grad, impl="eager", **options)
    result = run(visual_attention_map, query, key, index, grad, impl="triton", **options)
    assert result[0].dtype == torch.float32 and result[1].dtype == result[2].dtype == query.dtype
    for name, value, reference, expected in zip(("map", "dq", "dk"), result, eager, exact, strict=True):
        tolerance = max(torch.finfo(value.dtype).eps, 1e-6) * expected.abs().max()
        error, allowed = (value - expected).abs().max(), (reference - expected).abs().max() + tolerance
        assert error <= allowed, f"{name}: {error} > {allowed}"
    return result


# name: (B, H, H_kv, N, d), visual_index, key_mask
CASES = {
    "one image": ((1, 2, 2, 37, 32), images(37, [(5, 16)]), None),
    "several images, ragged": (
        (3, 4, 2, 45, 32),
        images(45, [(1, 8), (10, 11), (30, 45)], [(20, 33)], []),
        None,
    ),
    "left padding": (
        (3, 4, 1, 41, 64),
        images(41, [(0, 9), (17, 25)], [(11, 28)], [(40, 41)]),
        left_padding(41, 0, 5, 40),
    ),
    "small heads": ((2, 3, 3, 33, 16), images(33, [(2, 20)], [(0, 9), (12, 14)]), None),
    "large heads": ((1, 2, 1, 19, 128), images(19, [(3, 18)]), None),
    "larger heads": ((1, 1, 1, 17, 256), images(17, [(0, 17)]), None),
    "an image from a tile's last row on": ((1, 2, 2, 33, 32), images(33, [(15, 21)]), None),
    "one token": ((2, 2, 1, 1, 32), images(1, [(0, 1)], []), None),
}


@pytest.mark.parametrize(
    "dtype, heads",
    [(torch.float32, "mean"), (torch.float32, "all"), (torch.bfloat16, "mean"), (torch.float16, "all")],
)
@pytest.mark.parametrize("case", CASES)
def test_map_and_gradients(case, dtype, heads):
    shape, index, key_mask = CASES[case]
    query, key = tensors(*shape, dtype)
    options = dict(key_mask=key_mask, heads=heads)
    grad = gradient(query, index, heads)
    result = assert_as_accurate_as_eager(query, key, index, grad, **options)
    if dtype == torch.bfloat16:
        again = run(visual_attention_map, query, key, index, grad, impl="triton", **options)
        assert all(map(torch.equal, result, again))


def test_rows_and_samples_without_an_image_are_zero_and_get_no_gradient():
    query, key = tensors(2, 4, 2, 70, 32)
    index = images(70, [(40, 51)], [])
    grad = gradient(query, index)
    out, grad_query, grad_key = run(visual_attention_map, query, key, index, grad, impl="triton")
    assert (out[0, :40] == 0).all() and (out[0, 40:].sum(1) > 0).all()
    assert (grad_query[0, :, :40] == 0).all() and (grad_query[0, :, 41:] != 0).all()
    assert (grad_key[0] != 0).all()
    for tensor in (out, grad_query, grad_key):
        assert (tensor[1] == 0).all()


def test_keys_hidden_amid_the_sequence():
    """Image tokens among them. Rows of hidden positions still see the keys before them, as in eager attention."""
    query, key = tensors(2, 2, 1, 33, 32)
    index = images(33, [(2, 20)], [(0, 9), (12, 14)])
    options = dict(key_mask=torch.arange(66).view(2, 33) % 7 != 3)
    grad = gradient(query, index)
    expected = run(visual_attention_map, query.double(), key.double(), index, grad, impl="eager", **options)
    result = run(visual_attention_map, query, key, index, grad, impl="triton", **options)
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["mean", "all"])
def test_rows_without_gradient_are_skipped(heads):
    """As with losses on answer rows."""
    query, key = tensors(3, 2, 1, 67, 32)
    index = images(67, [(4, 20)], [(2, 9), (40, 44)], [(10, 30)])
    grad = gradient(query, index, heads)
    rows = torch.zeros(3, 67, dtype=torch.bool)
    rows[0, 35:37] = rows[1, 3] = rows[1, 60:] = True
    grad *= rows[..., None] if heads == "mean" else rows[:, None, :, None]
    _, grad_query, grad_key = assert_as_accurate_as_eager(query, key, index, grad, heads=heads)
    assert (grad_query.transpose(1, 2)[~rows] == 0).all() and (grad_query.transpose(1, 2)[rows] != 0).any()
    assert (grad_key[2] == 0).all()


def test_columns_in_any_order_with_gaps_and_repetitions():
    query, key = tensors(2, 2, 2, 37, 32)
    index = torch.tensor([[20, 3, -1, 4, 3, 36, 0, 3], [-1, -1, 9, 8, 7, -1, 5, 5]])
    for heads in ("mean", "all"):
        assert_as_accurate_as_eager(query, key, index, gradient(query, index, heads), heads=heads)


def test_strided_inputs_and_gradients():
    """Query and key as attention modules hold them, [B, N, H, d] sliced out of one projection; expanded gradients."""
    index = images(37, [(5, 16)], [(0, 4)])
    packed = torch.randn(2, 37, 4 + 2 + 2, 32)
    views = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2)
    assert_as_accurate_as_eager(*views, index, gradient(views[0], index))
    columns = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in views)
    assert_as_accurate_as_eager(*columns, index, gradient(views[0], index))
    assert_as_accurate_as_eager(*views, index, torch.ones((), dtype=torch.float64).expand(2, 37, 11))
    assert_as_accurate_as_eager(*views, index, gradient(views[0], index).transpose(1, 2).contiguous().transpose(1, 2))
    every = gradient(views[0], index, "all")
    assert_as_accurate_as_eager(*views, index, every.transpose(1, 2).contiguous().transpose(1, 2), heads="all")


@pytest.mark.parametrize("size", [1e-5, 3e4])
def test_float16_gradients_keep_small_and_large_numbers(size):
    query, key = tensors(2, 4, 2, 37, 32, torch.float16)
    index = images(37, [(5, 16)], [(0, 4)])
    grad = gradient(query, index) * size
    exact = run(truth, query.double(), key.double(), index, grad)
    result = run(visual_attention_map, query, key, index, grad, impl="triton")
    for value, expected in zip(result[1:], exact[1:], strict=True):
        assert (value - expected).abs().max() <= 2**-24 + 2e-3 * expected.abs().max()


@pytest.mark.parametrize("heads", ["mean", "all"])
def test_the_tiles_of_a_gpu(monkeypatch, heads):
    monkeypatch.undo()
    query, key = tensors(1, 2, 1, 141, 32, torch.float16)
    index = images(141, [(7, 140)])
    for table in (fused.LARGE, fused.SMALL):
        monkeypatch.setattr(fused, "tiles_for", lambda *_, table=table: table[64])
        assert_as_accurate_as_eager(query, key, index, gradient(query, index, heads), heads=heads)


def test_no_visual_token():
    query, key = tensors(2, 2, 2, 9, 32)
    index = torch.zeros(2, 0, dtype=torch.long)
    for heads in ("mean", "all"):
        grad = gradient(query, index, heads)
        out, *grads = run(visual_attention_map, query, key, index, grad, impl="triton", heads=heads)
        assert out.shape == ((2, 9, 0) if heads == "mean" else (2, 2, 9, 0))
        assert all((grad == 0).all() for grad in grads)


def test_one_sided_gradients_autocast_and_checkpoint():
    query, key = tensors(1, 4, 2, 37, 32)
    index = images(37, [(5, 16)])
    grad = gradient(query, index).float()
    expected = run(visual_attention_map, query, key, index, grad, impl="triton")
    only_query, only_key = query.clone().requires_grad_(), key.clone().requires_grad_()
    visual_attention_map(only_query, key, index, impl="triton").backward(grad)
    visual_attention_map(query, only_key, index, impl="triton").backward(grad)
    assert torch.equal(only_query.grad, expected[1]) and torch.equal(only_key.grad, expected[2])
    with torch.no_grad():
        out = visual_attention_map(only_query, only_key, index, impl="triton")
    assert torch.equal(out, expected[0]) and not out.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = run(visual_attention_map, query, key, index, grad, impl="triton")
    assert all(map(torch.equal, within, expected))
    only_query.grad = only_key.grad = None
    out = checkpoint(
        lambda q, k: visual_attention_map(q, k, index, impl="triton"), only_query, only_key, use_reentrant=False
    )
    out.backward(grad)
    assert torch.equal(only_query.grad, expected[1]) and torch.equal(only_key.grad, expected[2])


def test_scores_that_are_not_numbers_come_out_as_such():
    query, key = tensors(1, 2, 2, 37, 32)
    query[0, 0, 20] = torch.nan
    out = visual_attention_map(query, key, images(37, [(5, 16)]), impl="triton")
    assert out[0, 20].isnan().all() and not out[0, :20].isnan().any() and not out[0, 21:].isnan().any()


def test_unsupported_inputs_are_named():
    index = images(9, [(0, 4)])
    with pytest.raises(ValueError, match="float16, bfloat16, float32, got float64"):
        visual_attention_map(*tensors(1, 1, 1, 9, 32, torch.float64), index, impl="triton")
    with pytest.raises(ValueError, match="head sizes 16, 32, 64, 128, 256, got 80"):
        visual_attention_map(*tensors(1, 1, 1, 9, 80), index, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probe_finds_the_kernels_right(dtype):
    assert probe.disagreement(torch.device("cpu"), dtype, 32) is None


def test_probe_names_wrong_and_failing_kernels(monkeypatch):
    probe.disagreement.cache_clear()
    right = probe.visual_attention_triton
    # The map alone is wrong, then the gradients alone.
    monkeypatch.setattr(probe, "visual_attention_triton", lambda *given: right(*given) + 0.01)
    assert "wrong on cpu" in probe.disagreement(torch.device("cpu"), torch.float32, 32)
    monkeypatch.setattr(probe, "visual_attention_triton", lambda *given: 2 * right(*given) - right(*given).detach())
    probe.disagreement.cache_clear()
    assert "wrong on cpu" in probe.disagreement(torch.device("cpu"), torch.float32, 32)

    def fails(*_):
        raise RuntimeError("out of resources\nand more")

    monkeypatch.setattr(probe, "visual_attention_triton", fails)
    probe.disagreement.cache_clear()
    assert probe.disagreement(torch.device("cpu"), torch.float32, 32) == (
        "its kernels fail on cpu (RuntimeError: out of resources)"
    )
    probe.disagreement.cache_clear()


def test_probe_inside_a_checkpoint():
    """The hooks of non-reentrant checkpointing would take the probe's own backward for the recomputation's start."""
    probe.disagreement.cache_clear()
    calls = []

    def layer(x):
        calls.append(probe.disagreement(torch.device("cpu"), torch.float32, 32))
        return (x * x).sum()

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).backward()
    assert calls == [None, None]
    assert x.grad.tolist() == [2, 2, 2]
