"""The Triton implementation of the visual attention map.

What it computes is checked in Triton's interpreter (interpreted_triton.py, any machine with Triton) and on a GPU.
Between the two, the kernels are compiled for GPUs that are not here.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreted_triton import assert_as_accurate_as_eager, gradient, images, left_padding, run, tensors

from llava_compodistill.ops import visual_attention
from llava_compodistill.ops.visual_attention import fused, probe, visual_attention_map
from llava_compodistill.ops.visual_attention.key_lists import key_lists

try:
    import triton
except ImportError:
    triton = None

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled in the interpreter")
# bytes that a block may have, by compute capability
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@needs_triton
@pytest.mark.parametrize("chosen", ["columns or strided or one_sided", pytest.param("", marks=pytest.mark.long)])
def test_kernels_in_the_interpreter(chosen):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted_triton.py"),
        *(["-k", chosen] if chosen else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1] and " passed" in done.stdout.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh(monkeypatch):
    """Forget what has been found out about this machine, before and after."""
    for function in (fused.missing, visual_attention._announce):
        function.cache_clear()
    yield monkeypatch
    for function in (fused.missing, visual_attention._announce):
        function.cache_clear()


def test_without_triton_the_package_imports_and_the_error_names_it(fresh):
    code = (
        "import sys; sys.modules['triton'] = None; import llava_compodistill.ops as o; print(o.visual_attention_map)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    fresh.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        visual_attention_map(*tensors(1, 1, 1, 9, 32), images(9, [(0, 4)]), impl="triton")


@needs_triton
@needs_compiler
def test_without_cuda_the_error_names_it(fresh):
    with pytest.raises(RuntimeError, match="a CUDA device is missing, the query is on cpu"):
        visual_attention_map(*tensors(1, 1, 1, 9, 32), images(9, [(0, 4)]), impl="triton")


def test_auto_says_once_what_runs(fresh, caplog):
    caplog.set_level(logging.INFO, "llava_compodistill")
    inputs = *tensors(1, 1, 1, 9, 32), images(9, [(0, 4)])
    for _ in range(2):
        visual_attention_map(*inputs)
    assert [record.getMessage() for record in caplog.records] == ["Attention maps: chunked."]

    # On a GPU: Triton for what it supports, and a reason otherwise.
    query = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 2, 9, 128))
    fresh.setattr(fused, "missing", lambda device: None)
    fresh.setattr(probe, "disagreement", lambda *given: None)
    assert visual_attention._choose(query, query) == "triton"
    fresh.setattr(probe, "disagreement", lambda *given: "its kernels are wrong here")
    assert visual_attention._choose(query, query) == "chunked"
    query.shape = (1, 2, 9, 80)
    assert visual_attention._choose(query, query) == "chunked"
    fresh.setattr(fused, "missing", lambda device: "Triton is not installed")
    assert visual_attention._choose(query, query) == "chunked"
    assert [(record.levelname, record.getMessage()) for record in caplog.records[1:]] == [
        ("INFO", "Attention maps: triton."),
        ("WARNING", "Attention maps: chunked, not triton: its kernels are wrong here."),
        ("WARNING", "Attention maps: chunked, not triton: takes head sizes 16, 32, 64, 128, 256, got 80."),
        ("WARNING", "Attention maps: chunked, not triton: Triton is not installed."),
    ]
    fresh.undo()  # `missing` has to be the cached function again when its cache is cleared


# ---------------------------------------------------------------------------------------------------------------------
# The lists of keys
# ---------------------------------------------------------------------------------------------------------------------
def test_key_lists():
    index = images(12, [(2, 5), (8, 9)], [(6, 8)])
    lists = key_lists(index, left_padding(12, 0, 4), 12)
    assert lists.column is None
    assert lists.visual.tolist() == [[2, 3, 4, 8], [6, 7, 12, 12]]
    assert [[p for p in row if p < 12] for row in lists.other.tolist()] == [
        [0, 1, 5, 6, 7, 9, 10, 11],
        [4, 5, 8, 9, 10, 11],
    ]
    assert lists.visual_before[0].tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert lists.other_before[1].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6]


def test_key_lists_of_columns_in_any_order():
    index = torch.tensor([[7, -1, 2, 7, 0]])
    lists = key_lists(index, left_padding(12, 1), 12)  # position 0 is hidden
    assert lists.visual.tolist() == [[2, 7, 12, 12, 12]]
    assert lists.column.tolist() == [[1, 5, 0, 1, 5]]


def test_key_lists_are_made_once_for_all_layers_but_notice_changes():
    index, mask = images(12, [(2, 5)]), left_padding(12, 0)
    lists = key_lists(index, mask, 12)
    assert key_lists(index, mask, 12) is lists
    assert key_lists(index, None, 12) is not lists
    lists = key_lists(index, mask, 12)
    mask[0, 0] = False
    assert 0 not in key_lists(index, mask, 12).other[0]
    index[0, 0] = 1
    assert key_lists(index, mask, 12).visual.tolist() == [[1, 3, 4]]
    with torch.inference_mode():
        index = images(12, [(2, 5)])
        assert key_lists(index, None, 12) is not key_lists(index, None, 12)


# ---------------------------------------------------------------------------------------------------------------------
# For GPUs
# ---------------------------------------------------------------------------------------------------------------------
@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    "capability, dtype, size",
    [(90, torch.bfloat16, 128), (80, torch.float16, 256), (86, torch.bfloat16, 64), (80, torch.float32, 64)],
)
def test_kernels_compile_and_fit_the_shared_memory(capability, dtype, size, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llava_compodistill.ops.visual_attention import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys(("query", "key", "grad_query", "grad_key"), element)
    types |= dict.fromkeys(("lse", "delta", "out", "grad", "shift"), "*fp32") | {"scale": "fp32", "factor": "fp32"}
    types |= dict.fromkeys(("visual", "visual_before", "other", "other_before", "positions", "before"), "*i32")
    types |= {"active": "*i32", "active_before": "*i32"}
    tiles = fused.tiles_for(dtype, size, SHARED_MEMORY[capability])
    key_rows = tiles.grad_key.rows
    assert tiles.grad_query.rows % key_rows == 0
    for kernel, tile, constants in (
        (kernels.lse_kernel, tiles.lse, {"ROWS": tiles.lse.rows}),
        (kernels.map_kernel, tiles.map, {"ROWS": tiles.map.rows, "MEAN": True}),
        (
            kernels.grad_query_kernel,
            tiles.grad_query,
            {"ROWS": tiles.grad_query.rows, "TILE": key_rows, "NEED_QUERY": True},
        ),
        (kernels.grad_key_kernel, tiles.grad_key, {"TILE": key_rows, "VISUAL": True}),
        (kernels.grad_key_kernel, tiles.grad_key, {"TILE": key_rows, "VISUAL": False}),
    ):
        constants |= {"D": size, "COLUMNS": tile.columns, "WIDE": False}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {  # as torch's allocations and the strides of real models are
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if signature[name].startswith("*") or name.startswith("stride_")
        }
        binary = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        assert binary.metadata.shared <= SHARED_MEMORY[capability]
        assert "tf32" not in binary.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def dirty_memory(self):
        """Memory that nobody has written reads as NaN."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("heads", ["mean", "all"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
    def test_map_and_gradients(self, size, dtype, heads):
        length = 517
        index = images(length, [(35, 300), (310, 346)], [(1, 2), (400, 517)], []).cuda()
        mask = left_padding(length, 0, 0, 77).cuda()
        query, key = tensors(3, 6, 2, length, size, dtype, device="cuda")
        grad = gradient(query, index, heads)
        for key_mask in (None, mask):
            options = dict(key_mask=key_mask, heads=heads)
            result = assert_as_accurate_as_eager(query, key, index, grad, **options)
            again = run(visual_attention_map, query, key, index, grad, impl="triton", **options)
            assert all(map(torch.equal, result, again))

    @pytest.mark.parametrize("small", [False, True])
    def test_layouts_and_tiles(self, small, monkeypatch):
        """Module layout, unordered columns, one token, answer rows, both tables of tiles."""
        if small:
            monkeypatch.setattr(fused, "tiles_for", lambda dtype, size, _: fused.SMALL[max(size, 64)])
        for length in (1, 63, 200):
            packed = torch.randn(2, length, 4 + 4, 128, dtype=torch.bfloat16, device="cuda")
            query, key = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:].transpose(1, 2)
            index = torch.randperm(length, device="cuda")[None].expand(2, -1).clone()
            index[1, ::3] = -1
            grad = gradient(query, index)
            assert_as_accurate_as_eager(query, key, index, grad)
            grad[:, : length // 2] = 0
            assert_as_accurate_as_eager(query, key, index.sort(1, descending=True).values, grad)

    def test_auto_takes_it(self):
        query, key = tensors(1, 2, 2, 64, 128, torch.bfloat16, device="cuda")
        assert visual_attention._choose(query, key) == "triton"
        assert visual_attention._choose(query.double(), key.double()) == "chunked"

    def test_more_than_32_bits_of_elements(self):
        """[1, 20, 8192, 16384] of the map has 2.7e9 elements, 11 GB."""
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GiB of free GPU memory")
        length = 16384
        query, key = tensors(1, 20, 20, length, 64, torch.bfloat16, device="cuda")
        index = torch.arange(length // 2, device="cuda")[None]
        out = visual_attention_map(query, key, index, impl="triton", heads="all")
        rows = [0, 8191, 16383]
        scores = query[0, -1, rows].double() @ key[0, -1].double().T / 8
        hidden = torch.arange(length, device="cuda")[None] > torch.tensor(rows, device="cuda")[:, None]
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, : length // 2]
        torch.testing.assert_close(out[0, -1, rows].double(), expected, rtol=1e-4, atol=1e-6)
