"""Time and memory of rival implementations, in one process, and the row of a CSV that they become."""

from __future__ import annotations

import csv
import datetime
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llava_compodistill.about import commit

COLUMNS = (
    "suite preset variant batch length visual heads kv_heads head_size rows vocab teacher student dtype "
    "parity p20_ms p50_ms p80_ms limit_ms extra_mib time_exponent memory_exponent measured_mib "
    "predicted_mib error step_error samples_per_s tokens_per_s padding_share flops_share sight_share "
    "note device torch triton transformers commit date command"
).split()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    work: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Times in ms of each variant, by default on the wall's clock: {name: (p20, p50, p80)}.

    The variants take turns, so that a change of clocks or a neighbour on the machine meets them all alike. Each runs
    at least ``rounds`` times, and together they run for about ``seconds``. A call is timed from a device at rest to a
    device at rest; the calls are long beside that.
    """
    for call in work.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in work}
    started = time.perf_counter()
    while True:
        for name, call in work.items():
            synchronize(device)
            begin = clock()
            call()
            synchronize(device)
            times[name].append(1e3 * (clock() - begin))
        done = min(map(len, times.values()))
        if done >= rounds and time.perf_counter() - started > seconds:
            return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def extra_memory(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call needs at its peak above what was allocated before it. What it returns is alive at the peak."""
    if device.type == "cuda":
        call()  # libraries' workspaces
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    # The profiler sees every allocation of torch's, those inside operators too; the process's own peak would hide
    # whatever fits into memory that an earlier variant has given back.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak / 2**20


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: what "100 %" means in the FLOPs share of a step."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, median, _ = compare({"matmul": lambda: a @ b}, device, seconds=2, rounds=10)["matmul"]
    return 2 * size**3 / (median / 1e3)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _, median, _ = compare({"copy": lambda: target.copy_(source)}, device, seconds=1, rounds=10)["copy"]
    return 2 * source.numel() / (median / 1e3)


def limit_ms(flops: float, moved: float, device: torch.device, dtype: torch.dtype) -> float:
    """The least time for so many FLOPs and bytes on this machine, if all went at its measured best (a roofline)."""
    return 1e3 * max(flops / matrix_rate(device, dtype), moved / copy_rate(device))


def machine(device: torch.device) -> dict[str, str]:
    """The columns that say where a figure comes from."""
    import transformers

    try:
        import triton
    except ImportError:
        triton = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        name = (models[0].split(":", 1)[1].strip() if models else "CPU") + f", {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "-"),
        "transformers": transformers.__version__,
        "commit": commit() or "-",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "scripts/benchmark/run.py", *sys.argv[1:]]),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
