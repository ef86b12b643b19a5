"""The visual attention map against loops in float64, for the PyTorch implementations; memory of the chunked one."""

import math
import weakref

import numpy as np
import pytest
import torch
from checks import skip_halves
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from llava_compodistill.ops.visual_attention import IMPLEMENTATIONS, chunked, visual_attention_map

pytestmark = pytest.mark.once  # nothing here depends on transformers

IMPLS = sorted(set(IMPLEMENTATIONS) - {"triton"})  # which has a file of its own

# B, H, H_kv, N, d, N_v: odd sizes, grouped heads, one token, no visual token
SHAPES = [(1, 1, 1, 1, 3, 1), (2, 4, 4, 13, 5, 4), (3, 6, 2, 37, 8, 11), (2, 3, 1, 41, 7, 1), (2, 2, 2, 9, 4, 0)]


# Probabilities per chunk of 4 rows: one head of one sample, all heads of one sample, all heads of several samples
CHUNKINGS = {"one chunk": None, "head chunks": 1, "row chunks": 700, "sample chunks": 1000}


@pytest.fixture(params=CHUNKINGS)
def chunking(request, monkeypatch):
    """Make the chunked implementation cut small inputs the way it cuts large ones."""
    if request.param != "one chunk":
        monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", CHUNKINGS[request.param])
        monkeypatch.setitem(chunked.ROWS, "cpu", 4)
    return request.param


def make_inputs(shape, seed=0, dtype=torch.float64, padded=False):
    """Several images a sample: unordered, ragged, -1 anywhere; ``padded`` adds left padding of 0, 1, ... tokens."""
    batch, heads, kv_heads, length, size, visual = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, size, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, length, size, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(length, generator=generator)[:visual] for _ in range(batch)])
    for b in range(1, batch):
        index[b, torch.randperm(visual, generator=generator)[: visual // 2]] = -1
    key_mask = None
    if padded:
        key_mask = torch.arange(length)[None] >= 3 * torch.arange(batch)[:, None]
    return query.to(dtype), key.to(dtype), index, key_mask


def loop_map(query, key, index, key_mask=None, scale=None):
    """[B, H, N, N_v] by plain loops in float64."""
    q, k, ids = (x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in (query, key, index))
    batch, heads, length, size = q.shape
    scale = 1 / math.sqrt(size) if scale is None else scale
    out = np.zeros((batch, heads, length, ids.shape[1]))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1])]
            for i in range(length):
                seen = [j for j in range(i + 1) if key_mask is None or key_mask[b, j]]
                if not seen:
                    continue
                scores = scale * keys[seen] @ q[b, h, i]
                weights = np.exp(scores - scores.max())
                probs = dict(zip(seen, weights / weights.sum(), strict=True))
                out[b, h, i] = [probs.get(int(j), 0.0) for j in ids[b]]
    return torch.from_numpy(out)


def maps_and_gradients(query, key, index, grad, **options):
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    out = visual_attention_map(query, key, index, **options)
    out.backward(grad.to(out.dtype))
    return out.detach(), query.grad, key.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_loops(impl, shape, padded, chunking):
    query, key, index, key_mask = make_inputs(shape, padded=padded)
    expected = loop_map(query, key, index, key_mask)
    options = dict(key_mask=key_mask, impl=impl)
    every = visual_attention_map(query, key, index, heads="all", **options)
    mean = visual_attention_map(query, key, index, **options)
    assert every.dtype == mean.dtype == torch.float64
    torch.testing.assert_close(every, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl):
    query, key, index, _ = make_inputs((2, 4, 2, 11, 6, 5))
    expected = loop_map(query, key, index, scale=0.7)
    torch.testing.assert_close(visual_attention_map(query, key, index, scale=0.7, heads="all", impl=impl), expected)
    ones = torch.ones(2, 11)
    for mask in (ones.bool(), ones.long()):
        torch.testing.assert_close(
            visual_attention_map(query, key, index, scale=0.7, key_mask=mask, impl=impl), expected.mean(1)
        )
    twice = torch.cat([index, index], dim=1)  # a position asked for twice is answered, and differentiated, twice
    grad = torch.randn(2, 11, 10, dtype=torch.float64)
    once = maps_and_gradients(query, key, index, grad[..., :5] + grad[..., 5:], impl=impl)
    double = maps_and_gradients(query, key, twice, grad, impl=impl)
    torch.testing.assert_close(double[1:], once[1:])


@pytest.mark.parametrize("heads", ["mean", "all"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(impl, padded, heads, chunking):
    query, key, index, key_mask = make_inputs((2, 4, 2, 9, 3, 4), padded=padded)
    assert torch.autograd.gradcheck(
        lambda q, k: visual_attention_map(q, k, index, key_mask=key_mask, impl=impl, heads=heads),
        (query.requires_grad_(), key.requires_grad_()),
        fast_mode=chunking != "one chunk",
    )


@pytest.mark.parametrize("heads", ["mean", "all"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_gradients_equal_autograd(shape, padded, heads, chunking):
    query, key, index, key_mask = make_inputs(shape, seed=1, padded=padded)
    lead = (shape[0], shape[3]) if heads == "mean" else (shape[0], shape[1], shape[3])
    grad = torch.randn(*lead, shape[5], dtype=torch.float64)
    options = dict(key_mask=key_mask, heads=heads)
    expected = maps_and_gradients(query, key, index, grad, impl="eager", **options)
    result = maps_and_gradients(query, key, index, grad, impl="chunked", **options)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)


def test_text_keys_receive_gradient_through_the_denominator():
    query, key, _, _ = make_inputs((1, 2, 2, 12, 4, 1))
    index = torch.tensor([[3]])
    _, _, grad_key = maps_and_gradients(query, key, index, torch.ones(1, 12, 1), impl="chunked")
    assert (grad_key.abs().amax(dim=(0, 1, 3)) > 0).all()  # text keys before and after the visual one too


def test_row_blocks_without_gradient(chunking):
    """As with losses on answer rows: only some rows, of one sample, receive a gradient."""
    query, key, index, _ = make_inputs((3, 4, 2, 29, 5, 6))
    for heads in ("mean", "all"):
        grad = torch.zeros(3, 29, 6) if heads == "mean" else torch.zeros(3, 4, 29, 6)
        grad[1, ..., 17:19, :] = torch.randn(2, 6)
        expected = maps_and_gradients(query, key, index, grad, impl="eager", heads=heads)
        result = maps_and_gradients(query, key, index, grad, impl="chunked", heads=heads)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)
        assert (result[1][1] != 0).any() and (result[1][0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_keys_are_zero_in_every_dtype(impl, dtype, chunking):
    skip_halves(dtype)
    query, key, index, key_mask = make_inputs((4, 2, 2, 15, 4, 15), dtype=dtype, padded=True)
    out, grad_query, grad_key = maps_and_gradients(
        query, key, index, torch.ones(4, 15, 15), key_mask=key_mask, impl=impl
    )
    assert out.dtype == torch.float32 and grad_query.dtype == grad_key.dtype == dtype
    for tensor in (out, grad_query, grad_key):
        assert torch.isfinite(tensor).all() and (tensor != 0).any()
    dead = ~key_mask
    assert dead[3].sum() == 9
    assert (out[dead] == 0).all()
    for grad in (grad_query, grad_key):
        assert (grad.transpose(1, 2)[dead] == 0).all()
    assert (out.transpose(1, 2)[index == -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 6, 2, 37, 16, 11), (1, 4, 4, 53, 24, 30)])
def test_no_less_accurate_than_eager_in_the_same_dtype(shape, dtype, chunking):
    skip_halves(dtype)
    query, key, index, _ = make_inputs(shape, dtype=dtype)
    query, key = query * 3, key * 3  # scores large enough for rounding to matter
    grad = torch.randn(shape[0], shape[3], shape[5], dtype=torch.float64)
    truth = maps_and_gradients(query.double(), key.double(), index, grad, impl="eager")
    torch.testing.assert_close(truth[0], loop_map(query, key, index).mean(1))
    eager = maps_and_gradients(query, key, index, grad, impl="eager")
    result = maps_and_gradients(query, key, index, grad, impl="chunked")
    # One rounding of the result itself is allowed on top.
    for value, reference, exact in zip(result, eager, truth, strict=True):
        tolerance = max(torch.finfo(value.dtype).eps, 1e-6) * exact.abs().max()
        assert (value - exact).abs().max() <= (reference - exact).abs().max() + tolerance
    assert (eager[0] - truth[0]).abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 26])
def test_no_less_accurate_than_eager_on_a_gpu(dtype, chunk_elements, monkeypatch):
    """bfloat16 products run on tensor cores there, a path of its own."""
    monkeypatch.setattr(chunked, "DEFAULT_CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(chunked, "DEFAULT_ROWS", 32)
    query, key, index, _ = (None if x is None else x.cuda() for x in make_inputs((2, 6, 2, 137, 32, 60), dtype=dtype))
    grad = torch.randn(2, 137, 60, dtype=torch.float64, device="cuda")
    truth = maps_and_gradients(query.double(), key.double(), index, grad, impl="eager")
    eager = maps_and_gradients(query, key, index, grad, impl="eager")
    result = maps_and_gradients(query, key, index, grad, impl="chunked")
    for value, reference, exact in zip(result, eager, truth, strict=True):
        tolerance = max(torch.finfo(value.dtype).eps, 1e-6) * exact.abs().max()
        assert (value - exact).abs().max() <= (reference - exact).abs().max() + tolerance


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_no_grad_autocast_and_checkpoint(impl, chunking):
    query, key, index, _ = make_inputs((2, 4, 2, 19, 8, 7), dtype=torch.float32)
    grad = torch.randn(2, 19, 7)
    expected = maps_and_gradients(query, key, index, grad, impl=impl)
    with torch.no_grad():
        out = visual_attention_map(query, key, index, impl=impl)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected[0])

    query, key = query.requires_grad_(), key.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = visual_attention_map(query, key, index, impl=impl)
    out.backward(grad)
    torch.testing.assert_close((out.detach(), query.grad, key.grad), expected)

    query.grad = key.grad = None
    out = checkpoint(lambda q, k: visual_attention_map(q, k, index, impl=impl), query, key, use_reentrant=False)
    out.backward(grad)
    torch.testing.assert_close((out.detach(), query.grad, key.grad), expected)


def test_backward_inside_autocast(chunking):
    """Discouraged by PyTorch, yet seen in training loops: it must not round the products of the backward pass."""
    query, key, index, _ = make_inputs((2, 4, 2, 19, 8, 7), dtype=torch.float32)
    grad = torch.randn(2, 19, 7)
    expected = maps_and_gradients(query, key, index, grad, impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = maps_and_gradients(query, key, index, grad, impl="chunked")
    torch.testing.assert_close(within, expected)


def test_one_sided_gradients(chunking):
    query, key, index, _ = make_inputs((1, 2, 2, 9, 4, 3))
    grad = torch.randn(1, 9, 3, dtype=torch.float64)
    _, grad_query, grad_key = maps_and_gradients(query, key, index, grad, impl="eager")
    frozen_key = query.clone().requires_grad_()
    visual_attention_map(frozen_key, key, index, impl="chunked").backward(grad)
    torch.testing.assert_close(frozen_key.grad, grad_query)
    frozen_query = key.clone().requires_grad_()
    visual_attention_map(query, frozen_query, index, impl="chunked").backward(grad)
    torch.testing.assert_close(frozen_query.grad, grad_key)


def test_model_layout_and_non_contiguous_inputs(chunking):
    """Query and key as a model holds them: [B, N, H, d] transposed, sliced out of one projection."""
    packed = torch.randn(2, 21, 4 + 2, 8, dtype=torch.float64)
    query, key = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:].transpose(1, 2)
    index = torch.tensor([[4, 5, 6, 12], [0, 1, -1, -1]])
    expected = loop_map(query, key, index).mean(1)
    torch.testing.assert_close(visual_attention_map(query, key, index, impl="chunked"), expected)


class _StorageMeter(TorchDispatchMode):
    """Bytes of storage alive at a time that ops made inside the mode, and the largest single one."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given or storage._cdata in self.known:
                    continue
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return result

    def _release(self, cdata, size):
        self.live -= size
        self.known.discard(cdata)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.2"),
    reason="the meter does not see torch 2.1 free storages (the process takes no more memory than with newer ones)",
)
def test_chunked_never_holds_the_attention_matrix():
    batch, heads, length, size, visual = 1, 16, 512, 32, 128
    meters = {}
    for impl in ("eager", "chunked"):
        query = torch.randn(batch, heads, length, size, requires_grad=True)
        key = torch.randn(batch, heads, length, size, requires_grad=True)
        index = (torch.arange(visual) + 20)[None]
        with _StorageMeter() as meters[impl]:
            visual_attention_map(query, key, index, impl=impl).square().sum().backward()
    matrix = 4 * batch * heads * length**2
    assert meters["eager"].largest >= matrix  # the meter sees what it should
    assert meters["chunked"].largest <= matrix // 8
    assert meters["chunked"].peak <= meters["eager"].peak / 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(impl="flash"), ValueError, r"'auto'.*'chunked'.*'flash'"),
        (dict(heads="sum"), ValueError, r"\['mean', 'all'\].*'sum'"),
        (dict(query=torch.zeros(2, 5, 3)), ValueError, r"\[B, H, N, d\].*\[2, 5, 3\]"),
        (dict(key=torch.zeros(2, 4, 6, 3)), ValueError, r"agree.*\[2, 4, 6, 3\]"),
        (dict(key=torch.zeros(2, 3, 5, 3)), ValueError, "multiple"),
        (dict(key=torch.zeros(2, 4, 5, 3, dtype=torch.float64)), TypeError, "float64"),
        (dict(visual_index=torch.zeros(2, 1, dtype=torch.int32)), TypeError, "int64.*int32"),
        (dict(visual_index=torch.zeros(3, 1, dtype=torch.int64)), ValueError, r"B=2, got \[3, 1\]"),
        (dict(visual_index=torch.tensor([[5], [0]])), ValueError, r"\[0, 5\).*0 to 5"),
        (dict(visual_index=torch.tensor([[-2], [0]])), ValueError, "-2 to 0"),
        (dict(key_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"\[2, 5\], got \[2, 4\]"),
        (dict(key_mask=torch.ones(2, 5)), TypeError, "float32"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(
        query=torch.zeros(2, 4, 5, 3), key=torch.zeros(2, 4, 5, 3), visual_index=torch.zeros(2, 1, dtype=torch.int64)
    )
    positional = arguments | {name: change[name] for name in change if name in arguments}
    options = {name: change[name] for name in change if name not in arguments}
    with pytest.raises(error, match=message):
        visual_attention_map(*positional.values(), **options)
