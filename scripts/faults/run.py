"""Injected faults and hostile input: python scripts/faults/run.py [--suite all] [--cases kills=500,…] [--seed 0]

Suites
    kills   `train` is killed at a file operation, also inside half-written files, once or twice; then restarted
    cuts    the same with the power: what was not synced to the disk is lost
    disks   the disk fills up (goes over quota, breaks, becomes read-only) during `train`; then it is mended
    damage  a file of the newest checkpoint is cut, emptied, removed, changed, or becomes a pickle that runs code
    pairs   `train` runs twice at once in one output folder
    eval    kills, power cuts and full disks during `eval`
    init    kills, power cuts and full disks during `init --patch`
    fuzz    data, images, benchmarks, records and checkpoints that are not what they should be, through their readers

Each case has a name, SUITE:KIND:SEED, and is repeated alone by --case NAME. The exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parents[1]),
    str(HERE.parent),
]  # these files, the checkout's package, the miniature
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a process of many threads cannot be forked

import shim  # noqa: E402
from cases import Case, Outcome, Suite, table, write_report  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

NAMES = ("kills", "cuts", "disks", "damage", "pairs", "eval", "init", "fuzz")
console = Console()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    parser.add_argument("--suite", default="all", help=f"all, or some of {','.join(NAMES)}")
    parser.add_argument("--kind", help="of the suites' kinds, these alone, separated by commas")
    parser.add_argument(
        "--cases",
        type=_counts,
        default="kills=500,cuts=100,disks=200,damage=200,pairs=40,eval=150,init=150,fuzz=10000",
        help="of each suite, as the default has them: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind (default: %(default)s)")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--minutes", type=float, help="begin no further case after so long")
    parser.add_argument("--output", type=Path, help="a JSON file of all cases")
    parser.add_argument("--brief", action="store_true", help="there, of the cases that survived, their numbers alone")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        type=Case.parse,
        metavar="SUITE:KIND:SEED",
        help="this one alone, as often as given",
    )
    parser.add_argument("--keep", type=Path, help="an empty folder for all files, which stay there")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a number of 1 or more, is {text!r}")
    return int(text)


def _counts(text: str) -> dict[str, int]:
    found = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"unknown suite {name!r}; there are {', '.join(NAMES)}")
        found[name] = _positive(number)
    return found


def main() -> int:
    args = build_parser().parse_args()
    names = NAMES if args.suite == "all" else tuple(args.suite.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        console.print(f"--suite {args.suite}: unknown {', '.join(unknown)}; there are {', '.join(NAMES)}.")
        return 2
    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        console.print(f"--keep {args.keep}: must be empty.")
        return 2
    if shim.loaded() is None:
        return _with_shim()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        return _run(args, names, folder.resolve())
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _with_shim() -> int:
    """This command again, with the shim in it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = shim.build(Path(folder))
        except shim.NoCompiler as error:
            console.print(str(error))
            return 2
        child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv], shim.environment(library))
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except KeyboardInterrupt:
            os.waitpid(child, 0)
            return 130


def suites() -> dict[str, Suite]:
    import commands
    import fuzz
    import training

    return {**training.SUITES, **commands.SUITES, **fuzz.SUITES}


def _run(args: argparse.Namespace, names: Sequence[str], folder: Path) -> int:
    began = time.monotonic()
    # Nothing that turns while it waits: its thread would be forked with the rest.
    console.print("importing torch, transformers and LLaVA")
    import torch
    from world import make

    import llava_compodistill.eval.cli
    import llava_compodistill.train.run  # noqa: F401

    torch.set_num_threads(1)
    known = suites()
    if args.case:
        cases = args.case
    else:
        counts = {name: args.cases[name] for name in names if name in args.cases}
        cases = planned(known, counts, args.seed, args.kind.split(",") if args.kind else None)
    if not cases:
        console.print("There is no such case: --suite, --kind and --cases leave none.", markup=False)
        return 2
    wanted = list(dict.fromkeys(case.suite for case in cases))
    console.print("running everything undisturbed")
    world = make(folder / "world")
    for name in wanted:
        known[name].prepare(world, {case.kind for case in cases if case.suite == name})
    until = began + 60 * args.minutes if args.minutes else float("inf")
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as bars:
        for name in wanted:
            some = [case for case in cases if case.suite == name]
            bar = bars.add_task(name, total=len(some))
            for found in performed(known[name], world, some, folder / name, args.jobs, until):
                outcomes += found
                bars.advance(bar, len(found))
                bars.refresh()
            if time.monotonic() > until:
                break
    for one in outcomes:
        if not one.held:
            console.print(
                f"{one.case.name}: {one.outcome}: {one.injected}: {one.detail}", markup=False, soft_wrap=True
            )
    console.print(table(outcomes))
    lost = [one for one in outcomes if not one.held]
    if len(outcomes) < len(cases):
        console.print(f"{len(outcomes):,} of {len(cases):,} cases: --minutes were over.")
    if lost:
        console.print(f"alone: python scripts/faults/run.py --case {lost[0].case.name}", soft_wrap=True)
    if args.output:
        write_report(
            args.output, outcomes, shlex.join(["run.py", *sys.argv[1:]]), time.monotonic() - began, args.brief
        )
        console.print(f"{'the' if args.brief else 'all'} cases: {args.output}")
    return int(bool(lost))


def planned(
    known: dict[str, Suite], counts: Mapping[str, int], seed: int, kinds: Sequence[str] | None = None
) -> list[Case]:
    """So many cases of each suite, in turn of each of its kinds."""
    found = []
    for name, number in counts.items():
        some = [kind for kind in known[name].kinds if kinds is None or kind in kinds]
        found += [Case(name, some[n % len(some)], seed + n // len(some)) for n in range(number if some else 0)]
    return found


def performed(
    suite: Suite, world: Any, cases: Sequence[Case], folder: Path, workers: int, until: float
) -> Iterator[list[Outcome]]:
    """The outcomes of cases, a batch at a time. What stood behind a case that ended its process is begun again."""
    import forks

    turn = 0
    while cases:
        batches = [cases[n : n + suite.batch] for n in range(0, len(cases), suite.batch)]
        jobs = [_job(suite, world, batch, folder) for batch in batches]
        logs = folder / f"turn-{turn}"
        logs.mkdir(parents=True)
        left: list[Case] = []
        for number, ended in forks.each(jobs, logs, workers, suite.timeout * suite.batch, until):
            found = collect(batches[number], ended, folder)
            left += batches[number][len(found) :]
            yield found
        cases, turn = left, turn + 1


def _job(suite: Suite, world: Any, batch: Sequence[Case], folder: Path) -> Callable[[], list[str]]:
    """Perform a batch; each outcome is on the disk as soon as it is known, so that a death takes one case alone."""

    def perform() -> list[str]:
        for case in batch:
            place = _place(folder, case)
            place.mkdir(parents=True)
            found = suite.perform(world, case, place)
            text = json.dumps([found.outcome, found.injected, found.detail, found.notes])
            shutil.rmtree(place)
            _result(folder, case).write_text(text)
        return []

    return perform


def _place(folder: Path, case: Case) -> Path:
    return folder / case.name.replace(":", "-")


def _result(folder: Path, case: Case) -> Path:
    return folder / f"{case.name.replace(':', '-')}.json"


def collect(batch: Sequence[Case], ended: Any, folder: Path) -> list[Outcome]:
    """The outcomes of a batch, up to the first case that has none: it is what ended the process."""
    found = []
    for case in batch:
        path = _result(folder, case)
        if not path.exists():
            how = "hang" if ended.late else "died"
            text = f"exit {ended.status}: {' '.join(ended.text.split())[-300:]}"
            return [*found, Outcome(case, how, "", text)]
        found.append(Outcome(case, *json.loads(path.read_text())))
    return found


if __name__ == "__main__":
    sys.exit(main())
