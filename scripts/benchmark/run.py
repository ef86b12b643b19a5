"""Benchmarks of the package: python scripts/benchmark/run.py --suite op,head,step [--device cuda|cpu]

Suites
    op       the visual attention map, forward and backward: eager, chunked, Triton
    head     head + cross-entropy + KL: on all positions, on the answer rows, ours, Liger's where it is installed
    step     a DFT step of teacher and student: the usual way, logits KD only, ours
    fit      largest micro-batch and best throughput within a memory limit, for the same three
    profile  the operators above 2 % of our step
    compile  our step with and without --compile_layers
    growth   how time and memory grow with lengths, images, batch, answer rows, vocabulary and aligned layers
    sight    the sight guard's share of a run, in CPU time on a CPU
    teacher  a teacher's pass by where its weights live (--teacher_placement), and what that does to its targets
    dtype    a trained teacher in each --teacher_dtype, beside float32: KL and cosine of its targets, bytes, time
    cache    a step with the teacher and from a cache of it (--teacher_cache), by top-k and bits, and bytes a sample
    pack     useful tokens a second without padding and in packs, against padded batches in random order and grouped,
             at the lengths of LLaVA's instruction data (simulated); and the shares of padding
    eval     items a second of the evaluation engine against one question at a time, and against LLaVA's module, on the
             miniature
    images   the share of the time that an evaluation waits for images, by workers
    check    how long `llava-compodistill check` reads a manifest of 1.2 million samples, without decoding images
    loader   samples a second that one core prepares for training, and the workers that a GPU needs
    plan     memory that `llava-compodistill plan` predicts beside what is measured, by stage

All rivals of a suite run in one process on the same inputs. Each is first held against a float64 (op, head) or the
usual (step) computation; what fails gets no time. Presets give the sizes: `paper` (Qwen1.5-4B and 1.8B, SigLIP so400m,
bf16; a GPU of 80 GB or more), `cpu` (two cores, a few minutes), `medium` (a student of 134M parameters, for `sight`),
`short` (the same on short samples, for `plan`), `miniature` (the quick start's models).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler measures memory here and has nothing to say
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from packaging.version import Version  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT / "scripts"))  # the miniature
sys.path.insert(0, str(ROOT))  # the checkout's package, so that the commit in the CSV is the code that ran

import cache as cache_suite  # noqa: E402
import check as check_suite  # noqa: E402
import dtypes as dtype_suite  # noqa: E402
import evaluation  # noqa: E402
import growth as growth_suite  # noqa: E402
import head as head_suite  # noqa: E402
import images as image_suite  # noqa: E402
import loader as loader_suite  # noqa: E402
import op as op_suite  # noqa: E402
import pack as pack_suite  # noqa: E402
import plan as plan_suite  # noqa: E402
import sight as sight_suite  # noqa: E402
import step as step_suite  # noqa: E402
import teacher as teacher_suite  # noqa: E402
from measure import machine, write_csv  # noqa: E402
from pair import Pair  # noqa: E402
from presets import PRESETS, Preset  # noqa: E402

SUITES = (
    "op", "head", "step", "fit", "profile", "compile", "growth", "sight", "teacher", "dtype", "cache", "pack",
    "eval", "images", "loader", "check", "plan",
)  # fmt: skip
console = Console()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    parser.add_argument("--suite", default="op,head", help=f"suites separated by commas, of {', '.join(SUITES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="sizes (default: paper on cuda, cpu on cpu)")
    parser.add_argument(
        "--batch",
        help="micro-batches of step, sight, teacher, cache, pack and plan (1,8); profile and compile take the last",
    )
    parser.add_argument(
        "--length",
        help="lengths of op, step, fit, profile, compile, teacher, cache and plan (its first), such as 1024,2048",
    )
    parser.add_argument("--limit", help="memory limits of fit in GiB, such as 48,139 (default: the preset's)")
    parser.add_argument("--no-checkpointing", action="store_true", help="whole steps without gradient checkpointing")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each comparison")
    parser.add_argument("--records", type=int, default=1_200_000, help="samples of check (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="samples of dtype (default: %(default)s)")
    parser.add_argument(
        "flags", nargs="*", help="dtype: a DFT command line behind --, such as -- $(DRY_RUN=1 bash scripts/dft.sh) "
        "(default: the miniature's)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cases", help="cases of plan by number from 0, such as 0,3 (default: all)")
    parser.add_argument(
        "--calibration", type=Path, help="plan: write its FLOP/s here, for llava-compodistill plan --calibration"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark.csv"), help="CSV to write (default: %(default)s)"
    )
    return parser


def main() -> int:
    args = build_parser().parse_args()
    suites = args.suite.split(",")
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown:
        console.print(f"--suite {args.suite}: unknown {', '.join(unknown)}; there are {', '.join(SUITES)}.")
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: PyTorch sees no GPU here. --device cpu runs the same suites on small sizes.")
        return 2
    switching = sorted({"step", "fit", "compile", "growth"} & set(suites))
    if switching and Version(importlib.metadata.version("transformers")) < Version("5"):
        console.print(f"--suite {','.join(switching)}: switches attention backends on built models: transformers 5.")
        return 2
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset or ("paper" if args.device == "cuda" else "cpu")]
    preset = preset.change(numbers(args.batch), numbers(args.length), numbers(args.limit, float))
    origin, rows = machine(device), []
    for suite in suites:
        console.rule(f"{suite} on {origin['device']}")
        found = []
        for row in generate(suite, preset, device, args):
            found.append({**row, "preset": preset.name, **origin})
            rows.append(found[-1])
            write_csv(args.output, rows)  # after every row: a later suite may not fit the machine
            console.print(line(row), highlight=False)
        console.print(table(suite, found))
    console.print(f"{len(rows)} rows: {args.output}")
    return 0 if not any("FAILED" in str(row.get("parity", "")) for row in rows) else 1


def generate(suite: str, preset: Preset, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if suite == "op":
        yield from op_suite.run(preset.ops, device, args.seconds)
        return
    if suite == "head":
        yield from head_suite.run(preset.heads, device, args.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        if suite == "eval":
            yield from evaluation.run(folder, device, args.seconds)
            return
        if suite == "dtype":
            yield from dtype_suite.run(folder, device, args.flags, args.samples, args.seconds)
            return
        if suite == "images":
            yield from image_suite.run(folder, device, args.seconds)
            return
        if suite == "check":
            yield from check_suite.run(folder, args.records)
            return
        if suite == "loader":
            yield from loader_suite.run(folder, args.seconds)
            return
        if suite == "plan":
            yield from plan(preset, device, folder, args)
            return
        with console.status("building models with random weights"):
            pair = Pair(preset.pair, device, Path(folder), checkpointing=not args.no_checkpointing)
        if suite == "step":
            yield from step_suite.run(pair, folder, preset.batches, args.seconds)
        elif suite == "fit":
            yield from step_suite.run_fit(pair, folder, preset.limits, args.seconds)
        elif suite == "growth":
            yield from growth_suite.run(preset, pair, folder, args.seconds)
        elif suite == "sight":
            yield from sight_suite.run(pair, folder, preset.batches, args.seconds, preset.global_batch)
        elif suite == "teacher":
            yield from teacher_suite.run(pair, folder, preset.batches, args.seconds)
        elif suite == "cache":
            yield from cache_suite.run(pair, folder, preset.batches, args.seconds)
        elif suite == "pack":
            yield from pack_suite.run(pair, folder, preset.batches, args.seconds)
        elif suite == "compile":
            yield from step_suite.run_compiled(pair, folder, preset.batches[-1], args.seconds)
        else:
            yield from step_suite.run_profile(pair, folder, preset.batches[-1])


def plan(preset: Preset, device: torch.device, folder: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    chosen = numbers(args.cases) or range(len(plan_suite.CASES))
    if not set(chosen) <= set(range(len(plan_suite.CASES))):
        raise SystemExit(f"--cases {args.cases}: numbers from 0 to {len(plan_suite.CASES) - 1}.")
    cases = [plan_suite.CASES[number] for number in chosen]
    if args.batch:  # instead of the cases' own
        cases = [replace(case, batch=size) for case in cases for size in preset.batches]
    found = []
    for result in plan_suite.run(preset.pair, device, folder, cases):
        found.append(result)
        yield result[0]
    if args.calibration:
        text = json.dumps(plan_suite.calibration(found, machine(device)), indent=2)
        args.calibration.write_text(text + "\n", encoding="utf-8")


def numbers(text: str | None, kind: type = int) -> tuple | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise SystemExit(f"{text!r}: must be {'whole ' * (kind is int)}numbers separated by commas.") from None


TITLES = {
    "variant": "variant",
    "note": "",
    "batch": "B",
    "length": "N",
    "visual": "N_v",
    "kv_heads": "kv",
    "rows": "rows",
    "p50_ms": "ms",
    "limit_ms": "limit",
    "extra_mib": "MiB",
    "time_exponent": "time ~",
    "memory_exponent": "memory ~",
    "measured_mib": "measured MiB",
    "predicted_mib": "predicted",
    "error": "error",
    "step_error": "error above rest",
    "samples_per_s": "samples/s",
    "tokens_per_s": "useful tokens/s",
    "padding_share": "padding",
    "flops_share": "MFU",
}


def shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def line(row: dict[str, Any]) -> str:
    names = [*TITLES, "parity"]
    return "  ".join(f"{TITLES.get(n, n)} {shown(row[n])}".strip() for n in names if row.get(n) not in (None, ""))


def table(suite: str, rows: list[dict[str, Any]]) -> Table:
    """The suite's medians, each beside its ratio to the first variant of the same sizes."""
    names = [name for name in TITLES if any(row.get(name) not in (None, "") for row in rows)]
    result = Table(title=suite, title_justify="left", padding=(0, 0, 0, 1), box=box.SIMPLE)
    ratios = [name for name in ("p50_ms", "extra_mib", "samples_per_s", "tokens_per_s") if name in names]
    ratios += ["batch"] if suite == "fit" else []
    for name in names:
        result.add_column(TITLES[name], justify="left" if name in ("variant", "note") else "right")
        if name in ratios:
            result.add_column("ratio", justify="right", style="bold")
    first: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        # In op and head a note is one of the sizes: the pass, or whether the head is trained.
        sizes = ["length", "visual"] if suite == "fit" else ["batch", "length", "visual", "heads", "kv_heads", "rows"]
        # In op and head a note is one of the sizes (the pass, whether the head is trained), in others it begins so.
        note = row.get("note", "").split(";")[0] if suite in ("op", "head", "fit", "loader", "growth") else ""
        kind = row["variant"].split(",")[0] if suite == "growth" else ""
        base = first.setdefault((*map(row.get, sizes), row.get("head_size"), note, kind), row)
        cells = []
        for name in names:
            cells.append(shown(row.get(name, "")))
            if name in ratios:
                cells.append(f"{row[name] / base[name]:.3f}" if row.get(name) and base.get(name) else "")
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    sys.exit(main())
