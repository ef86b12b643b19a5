"""`llava-compodistill eval`: ask a model a benchmark's questions, score the answers, print them beside the paper's."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import DataError, MissingData, NonFiniteModelError, RecordsError, SampleError
from ..hosts import disk
from ..hosts.llava.images import most_pixels
from . import check, protocols, shares
from .benchmarks import VARIABLE, files, registered
from .benchmarks.base import Benchmark, EngineBenchmark
from .benchmarks.llava import LlavaBenchmark
from .checkpoint import TEMPLATES, check_checkpoint, check_template, prompt_of, template_of
from .hub import fetch
from .judge import Verdicts, check_judge, judge
from .llava_suite import run_llava_benchmark
from .records import made_with, read_records
from .run import Run
from .summaries import show

if TYPE_CHECKING:
    from .engine import Engine

console = Console()
#: At most so many unreadable images are named on the screen.
_NAMED = 3


def build_parser() -> argparse.ArgumentParser:
    known = ",".join(registered())
    parser = argparse.ArgumentParser(prog="llava-compodistill eval", description=__doc__)
    parser.add_argument("--model-path", help="checkpoint folder")
    parser.add_argument("--model-base", help="base model of a LoRA checkpoint")
    parser.add_argument(
        "--benchmarks",
        default="all",
        help=f"all that have data, or some of {known} ({VARIABLE} names modules with more)",
    )
    parser.add_argument("--data-root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of records and summaries (default: MODEL/eval)")
    parser.add_argument(
        "--name",
        help="name under which the answers to LLaVA's six are stored with the data (default: the checkpoint folder's)",
    )
    parser.add_argument(
        "--protocol",
        choices=(*protocols.CHOOSING, *protocols.MATCHING),
        help="how captions are matched with images: choice (the letter of the better one, both orders), choice-logits "
        '(the likelier letter), likelihood (log-probability per token), yes (P("Yes") to a question); default: choice '
        "for SugarCrepe and Winoground, likelihood for SADE and BiVLC",
    )
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's, else by its type)")
    parser.add_argument("--caption-prompt", default=protocols.CAPTION_PROMPT, help="prompt of the likelihood protocol")
    parser.add_argument("--batch-size", type=_positive, default=16, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--device", type=_device, help="cuda, cuda:N or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on cuda; LLaVA's own module takes none",
    )
    parser.add_argument("--processes", type=_positive, help="number of parallel processes (default: one per GPU)")
    parser.add_argument(
        "--image-workers",
        type=_positive_or_0,
        help="number of processes per model that read images ahead of it (default: up to 8 on cuda, 0 on the CPU)",
    )
    parser.add_argument(
        "--judge",
        metavar="MODEL",
        help="natural-language inference model (name or folder) that judges Reefknot's open answers; without it no "
        "rscore is reported",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="list the benchmarks' files that are present or missing, then exit; no model needed",
    )
    parser.add_argument("--hub", action="store_true", help="get SugarCrepe, BiVLC, Winoground from the hub if missing")
    parser.add_argument("--engine", action="store_true", help="ask LLaVA's six in batches, with LLaVA's own prompts")
    parser.add_argument("--overwrite", action="store_true", help="ask again what was answered already")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # K/N: how a process is told its part of the items
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a number of 1 or more, is {text!r}")
    return int(text)


def _positive_or_0(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, is {text!r}")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cuda, cuda:N or cpu, is {text!r}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[2:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    known = registered()
    names = [name.strip().lower() for name in args.benchmarks.split(",")]
    names = list(known) if names == ["all"] else names
    args.benchmarks = "all" if names == list(known) else ",".join(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        console.print(f"--benchmarks: unknown {', '.join(unknown)}; there are {', '.join(known)}.{hint}")
        return 2
    chosen = [known[name] for name in names]
    most_pixels()  # a limit that is none shows now
    if not args.data_root.is_dir() and not args.hub:
        raise DataError(
            f"--data-root {args.data_root}: there is no such folder. It holds the benchmarks' own folders."
        )
    if args.check:
        return check_data(args, chosen)
    if not args.model_path:
        console.print("--model-path is missing: the checkpoint's folder. (--check needs none.)", soft_wrap=True)
        return 2
    if args.judge and not args.share:  # a share answers, and is not scored
        if not any(isinstance(benchmark, EngineBenchmark) and benchmark.judged for benchmark in chosen):
            console.print(
                f"--judge: none of {', '.join(names)} has answers for a judge; reefknot has.", soft_wrap=True
            )
            return 2
        check_judge(args.judge)
    check_checkpoint(args.model_path, args.model_base)
    if not args.conv_mode:
        args.conv_mode = template_of(args.model_path, lambda text: console.print(text, markup=False, soft_wrap=True))
    if args.conv_mode not in TEMPLATES.values():
        check_template(args.conv_mode)
    args.devices = shares.devices(args.device, args.processes)
    args.dtype_given, args.dtype = args.dtype, shares.dtype_for(args.devices, args.dtype)
    with disk.explained(str(folder(args)), "what was answered is kept, and the others are asked"):
        return answer(args, argv, chosen)


def answer(args: argparse.Namespace, argv: Sequence[str], chosen: Sequence[Benchmark]) -> int:
    """Ask what is not answered yet, and score; an exit status."""
    # Everything is read and checked before a model is: a missing image shows now, not after hours.
    plan = prepare(args, chosen)
    if args.share:
        return ask_share(args, plan)
    for text in plan.absent:
        console.print(f"left out: {text}", markup=False, soft_wrap=True)
    for text in plan.wrong:
        console.print(f"error: {text}", markup=False, soft_wrap=True)
    if args.benchmarks != "all" and (plan.absent or plan.wrong):
        return 2
    if not (plan.runs or plan.theirs):
        console.print(f"There is nothing to evaluate in --data-root {args.data_root}.", soft_wrap=True)
        return 2
    try:
        summaries = evaluate(args, argv, plan)
    except KeyboardInterrupt:
        console.print("Stopped. What was answered is kept; the same command goes on from there.")
        return 130
    if summaries:
        show(summaries, args.name or Path(args.model_path).name, console)
    for text in plan.wrong:
        console.print(f"error: {text}", markup=False, soft_wrap=True)
    return int(bool(plan.wrong))


def check_data(args: argparse.Namespace, chosen: Sequence[Benchmark]) -> int:
    """`--check`: 0 when all that is asked for is there."""
    found = []
    with console.status("reading the benchmarks' files"):
        for benchmark in chosen:
            found.append(check.look(benchmark, args.data_root, lambda one: unpacked(args, one)))
    check.show(found, args.data_root, console)
    return int(any(entry.state != "complete" for entry in found))


def unpacked(args: argparse.Namespace, benchmark: EngineBenchmark) -> None:
    """Write a benchmark's files from a download that lies there, or with --hub from the hub."""
    if benchmark.hub is not None and not args.share:
        fetch(benchmark, args.data_root, console.print, online=args.hub)


def evaluate(args: argparse.Namespace, argv: list[str], plan: Plan) -> list[dict[str, Any]]:
    """Everything that is planned; what fails goes into `plan.wrong`."""
    summaries = own_benchmarks(args, argv, plan)
    for benchmark in plan.theirs:
        console.rule(benchmark.title)
        options = {"conv_mode": args.conv_mode, "model_base": args.model_base, "model_name": args.name}
        options |= {"devices": args.devices, "overwrite": args.overwrite}
        options |= {"engine": args.engine, "batch_size": args.batch_size, "dtype": args.dtype_given}
        options |= {"image_workers": args.image_workers}
        try:
            summary = run_llava_benchmark(benchmark.name, args.model_path, args.data_root, folder(args), **options)
            summaries.append(summary)
        except DataError as error:
            plan.wrong.append(f"{benchmark.title}: {error}")
    return summaries


def folder(args: argparse.Namespace) -> Path:
    path = Path(args.model_path)
    if args.output or path.is_dir():
        return args.output or path / "eval"
    return Path("eval") / path.name  # a name on the hub: a folder of that name would be taken for the model


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        runs: of the benchmarks that the engine asks.
        theirs: those that LLaVA's modules ask, or the engine in their place (`vqa_loader`).
        absent: why others are left out: nobody has got their files.
        wrong: what is wrong with others, so that they are not, or not wholly, evaluated.
    """

    runs: list[Run] = field(default_factory=list)
    theirs: list[LlavaBenchmark] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def prepare(args: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> Plan:
    """Read the benchmarks' files, and whether records that are there can be gone on with."""
    plan = Plan()
    prompt = prompt_of(args.model_path, args.conv_mode)
    about = made_with(args.model_path, args.conv_mode, model_base=args.model_base, dtype=args.dtype)
    for benchmark in benchmarks:
        try:
            if isinstance(benchmark, LlavaBenchmark):
                benchmark.check(args.data_root)
                plan.theirs.append(benchmark)
                continue
            protocol = args.protocol
            if args.benchmarks == "all" and protocol not in benchmark.protocols:
                protocol = None  # its own first one; the table says which
            unpacked(args, benchmark)
            with files.noted() as read:
                items = benchmark.load(args.data_root)
            hashes = files.named_below(args.data_root, read)
            run = Run(benchmark, items, about, folder(args), protocol, args.caption_prompt, hashes, prompt)
            if not (args.share or args.overwrite):
                run.begin()
            plan.runs.append(run)
        except MissingData as error:
            plan.absent.append(str(error))
        except ValueError as error:  # DataError, RecordsError, or a protocol that the benchmark lacks
            plan.wrong.append(str(error))
    return plan


def own_benchmarks(args: argparse.Namespace, argv: list[str], plan: Plan) -> list[dict[str, Any]]:
    engine, summaries = None, []
    for run in plan.runs:
        started, wrong = time.monotonic(), []
        try:
            left = run.begin(args.overwrite)
            with progress() as bars:
                bar = bars.add_task(run.benchmark.title, total=len(run.items), completed=len(run.items) - len(left))

                def advance(count: int, bar=bar, bars=bars) -> None:
                    bars.advance(bar, count)

                if left and len(args.devices) > 1:
                    ask_in_processes(run, [*argv, "--conv-mode", args.conv_mode], args.devices, advance)
                    run.begin()  # joins the shares
                elif left:
                    engine = engine or load(args)
                    wrong = run.ask(engine, left, run.path, advance)
            for text in wrong[1:_NAMED]:  # the first is in the error of `finish`
                console.print(text, markup=False, soft_wrap=True)
            summaries.append(run.finish(wrong, verdicts_on(run, args)))
        except (DataError, RecordsError, SampleError, NonFiniteModelError) as error:
            plan.wrong.append(f"{run.benchmark.title}: {error}")
            console.print(str(error), markup=False, soft_wrap=True)
            continue
        seconds = time.monotonic() - started
        rate = f" in {seconds:.0f} s ({_rate(len(left), seconds)})" if left else ", answered before"
        console.print(f"{len(run.items)} items{rate}: {run.output / (run.benchmark.name + '.json')}")
    if engine is not None:
        del engine
        free_memory()  # LLaVA's modules run in processes of their own, on the same GPU
    return summaries


def verdicts_on(run: Run, args: argparse.Namespace) -> Verdicts | None:
    """What --judge says of the answers; None where it has nothing to say, or they are not all there."""
    records = read_records(run.path) if args.judge and run.benchmark.judged else []
    if len(records) < len(run.items):
        return None
    asked = run.benchmark.judged(records)
    device = args.device or ("cpu" if args.devices[0] is None else "cuda")
    with progress() as bars:
        bar = bars.add_task(f"{run.benchmark.title}, judged", total=len(asked))
        path = run.path.with_name(f"{run.benchmark.name}.judge.jsonl")
        return judge(args.judge, asked, path, device, lambda count: bars.advance(bar, count))


def _rate(items: int, seconds: float) -> str:
    """Whichever of the two is above 1: slow ones would read as 0.0 a second."""
    return f"{items / seconds:.1f} a second" if items >= seconds else f"{seconds / items:.1f} s each"


def ask_in_processes(
    run: Run, argv: list[str], devices: Sequence[str | None], progress: Callable[[int], None]
) -> None:
    """This command again, once a device, for one benchmark and a share of its items."""
    flags = ["-m", "llava_compodistill.cli", "eval", *argv, "--benchmarks", run.benchmark.name]
    flags = [flag for flag in flags if flag != "--overwrite"]
    if run.protocol in (*protocols.CHOOSING, *protocols.MATCHING):
        flags += ["--protocol", run.protocol]
    if devices[0] is not None:
        flags += ["--device", "cuda"]  # the one that it sees
    count = len(devices)
    commands = [[*flags, "--processes", "1", "--share", f"{number}/{count}"] for number in range(count)]
    paths = [shares.share_path(run.path, number, count) for number in range(count)]
    shares.run_processes(commands, devices, lambda: shares.lines_in(paths), progress)


def ask_share(args: argparse.Namespace, plan: Plan) -> int:
    """What a process of `ask_in_processes` does: answer its items into a file of its own."""
    number, count = map(int, args.share.split("/"))
    (run,) = plan.runs
    done = {record["id"] for record in read_records(run.path)}
    left = run.share([item for item in run.items if item.id not in done], number, count)
    if left:
        wrong = run.ask(load(args), left, shares.share_path(run.path, number, count))
        for text in wrong[:_NAMED]:
            print(text, file=sys.stderr)  # what it prints to standard output nobody sees
    return 0


def free_memory() -> None:
    """Give the GPU back what PyTorch keeps for later."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def load(args: argparse.Namespace) -> Engine:
    from .loading import load_engine

    return load_engine(
        args.model_path,
        args.conv_mode,
        model_base=args.model_base,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        image_workers=image_workers(args),
        processes=processes(args),
    )


def image_workers(args: argparse.Namespace) -> int:
    """--image-workers, or as many as `pictures` takes by itself."""
    from .pictures import workers_by_default

    if args.image_workers is not None:
        return args.image_workers
    return workers_by_default(args.devices[0] is not None, processes(args))


def processes(args: argparse.Namespace) -> int:
    """How many processes ask the benchmark, this one among them."""
    return int(args.share.split("/")[1]) if args.share else 1


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")
