"""`llava-compodistill eval`: ask a model a benchmark's questions, score the answers, print them beside the paper's."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import protocols, shares
from .formats import DataError
from .hub import ON_HUB, fetch
from .llava_suite import LLAVA_BENCHMARKS, check, run_llava_benchmark
from .records import read_records
from .suite import BENCHMARKS, Run, template_of
from .summaries import EVERY, show

if TYPE_CHECKING:
    from .engine import Engine

console = Console()


def build_parser() -> argparse.ArgumentParser:
    known = ",".join(EVERY)
    parser = argparse.ArgumentParser(prog="llava-compodistill eval", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="base model of a LoRA checkpoint")
    parser.add_argument("--benchmarks", default="all", help=f"all that have data, or some of {known}")
    parser.add_argument("--data-root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of records and summaries (default: MODEL/eval)")
    parser.add_argument("--name", help="of the answers to LLaVA's six, which lie with the data (default: the model's)")
    parser.add_argument(
        "--protocol",
        choices=(*protocols.CHOOSING, *protocols.MATCHING),
        help="how captions are matched with images (default: each benchmark's first)",
    )
    parser.add_argument("--conv-mode", help="conversation template (default: by the model's type)")
    parser.add_argument("--caption-prompt", default=protocols.CAPTION_PROMPT, help="of the likelihood protocol")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--processes", type=int, help="at once (default: one a GPU)")
    parser.add_argument("--hub", action="store_true", help="get SugarCrepe, BiVLC, Winoground from the hub if missing")
    parser.add_argument("--overwrite", action="store_true", help="ask again what was answered already")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # K/N: how a process is told its part of the items
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[2:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.conv_mode = args.conv_mode or template_of(args.model_path)
    names = list(EVERY) if args.benchmarks == "all" else args.benchmarks.split(",")
    unknown = [name for name in names if name not in EVERY]
    if unknown:
        console.print(f"--benchmarks {args.benchmarks}: unknown {', '.join(unknown)}; there are {', '.join(EVERY)}.")
        return 2
    # Everything is read and checked before a model is: a missing image shows now, not after hours.
    runs, theirs, left_out = prepare(args, names)
    if left_out and args.benchmarks != "all":
        console.print(left_out[0], markup=False)
        return 2
    for text in left_out:
        console.print(f"left out: {text}", markup=False)
    if args.share:
        return ask_share(args, runs)
    if not runs and not theirs:
        return 2
    summaries, failed = own_benchmarks(args, argv, runs), False
    for name in theirs:
        console.rule(LLAVA_BENCHMARKS[name].title)
        options = {"conv_mode": args.conv_mode, "model_base": args.model_base, "overwrite": args.overwrite}
        options |= {"model_name": args.name, "devices": shares.devices(args.device, args.processes)}
        try:
            summaries.append(run_llava_benchmark(name, args.model_path, args.data_root, folder(args), **options))
        except DataError as error:
            failed = True
            console.print(str(error), markup=False)
    show(summaries, Path(args.model_path).name, console)
    return int(failed)


def folder(args: argparse.Namespace) -> Path:
    path = Path(args.model_path)
    if args.output or path.is_dir():
        return args.output or path / "eval"
    return Path("eval") / path.name  # a name on the hub: a folder of that name would be taken for the model


def prepare(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Run], list[str], list[str]]:
    """(our benchmarks, LLaVA's, why others are left out)."""
    runs, theirs, left_out = [], [], []
    for name in names:
        try:
            if name in LLAVA_BENCHMARKS:
                check(name, args.data_root)
                theirs.append(name)
                continue
            benchmark, protocol = BENCHMARKS[name], args.protocol
            if args.benchmarks == "all" and protocol not in benchmark.protocols:
                protocol = None  # its own first one; the table says which
            if args.hub and name in ON_HUB and not args.share:
                fetch(name, args.data_root, console.print)
            items = benchmark.load(args.data_root)
            about = (args.model_path, args.conv_mode, folder(args), protocol, args.caption_prompt)
            runs.append(Run(benchmark, items, *about))
        except ValueError as error:  # DataError, or a protocol that the benchmark lacks
            left_out.append(str(error))
    return runs, theirs, left_out


def own_benchmarks(args: argparse.Namespace, argv: list[str], runs: Sequence[Run]) -> list[dict[str, Any]]:
    devices = shares.devices(args.device, args.processes)
    engine, summaries = None, []
    for run in runs:
        left = run.begin(args.overwrite)
        started = time.monotonic()
        with progress() as bars:
            bar = bars.add_task(run.benchmark.title, total=len(run.items), completed=len(run.items) - len(left))

            def advance(count: int, bar=bar, bars=bars) -> None:
                bars.advance(bar, count)

            if left and len(devices) > 1:
                ask_in_processes(run, argv, devices, advance)
                run.begin()  # joins the shares
            elif left:
                engine = engine or load(args)
                run.ask(engine, left, run.path, progress=advance)
        summaries.append(run.finish())
        seconds = time.monotonic() - started
        rate = f" in {seconds:.0f} s ({len(left) / seconds:.1f} a second)" if left else ", answered before"
        console.print(f"{len(run.items)} items{rate}: {run.output / (run.benchmark.name + '.json')}")
    return summaries


def ask_in_processes(
    run: Run, argv: list[str], devices: Sequence[str | None], progress: Callable[[int], None]
) -> None:
    """This command again, once a device, for one benchmark and a share of its items."""
    flags = ["-m", "llava_compodistill.cli", "eval", *argv, "--benchmarks", run.benchmark.name]
    flags = [flag for flag in flags if flag != "--overwrite"]
    if run.protocol in run.benchmark.protocols and run.protocol != "answer":
        flags += ["--protocol", run.protocol]
    if devices[0] is not None:
        flags += ["--device", "cuda"]  # the one that it sees
    count = len(devices)
    commands = [[*flags, "--processes", "1", "--share", f"{number}/{count}"] for number in range(count)]
    paths = [shares.share_path(run.path, number, count) for number in range(count)]
    shares.run_processes(commands, devices, lambda: shares.lines_in(paths), progress)


def ask_share(args: argparse.Namespace, runs: Sequence[Run]) -> int:
    """What a process of `ask_in_processes` does: answer its items into a file of its own."""
    number, count = map(int, args.share.split("/"))
    (run,) = runs
    done = {record["id"] for record in read_records(run.path)}
    left = [item for item in run.items if item.id not in done][number::count]
    run.ask(load(args), left, shares.share_path(run.path, number, count))
    return 0


def load(args: argparse.Namespace) -> Engine:
    from .loading import load_engine

    return load_engine(
        args.model_path,
        args.conv_mode,
        model_base=args.model_base,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
    )


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
