"""`llava-compodistill miniature …`: the miniature world from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to quickstart, data, benchmarks, layers or store-weights."""
    parser = argparse.ArgumentParser(
        prog="llava-compodistill miniature",
        description="The miniature world: everything made here, nothing downloaded.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("quickstart", help="train, evaluate and compare (see quickstart --help)", add_help=False)
    data = commands.add_parser("data", help="write the data set alone, in LLaVA's format")
    data.add_argument("output", type=Path)
    data.add_argument("--preset", default="default", choices=("default", "smoke", "gpu"))
    store = commands.add_parser(
        "store-weights", help="freeze a run's tower, base model and teacher into the repository"
    )
    store.add_argument("run", type=Path, help="folder of a run made with --from-scratch")
    asked = commands.add_parser("benchmarks", help="the held-out sets in the formats of SugarCrepe, SADE, …")
    asked.add_argument("data", type=Path, help="folder of `data`, or RUN/data of a quick start")
    asked.add_argument("output", type=Path, help="what `llava-compodistill eval --data-root` then takes")
    asked.add_argument("--split", choices=("val", "test"), default="val")
    layers = commands.add_parser("layers", help="in which layers a run's teacher reads the image")
    layers.add_argument("run", type=Path, nargs="?", default=Path("runs/miniature"))
    layers.add_argument("--checkpoint", type=Path, help="another checkpoint than the run's teacher")
    layers.add_argument("--split", choices=("val", "test"), default="val")
    args, rest = parser.parse_known_args(argv)
    if args.command == "quickstart":
        from .quickstart import main as quickstart

        return quickstart(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "data":
        from .dataset import WorldConfig, write_dataset

        manifest = write_dataset(args.output, WorldConfig.preset(args.preset))
        print(f"{args.output}: {manifest.get('counts', '')}")
        return 0
    if args.command == "benchmarks":
        from .benchmarks import write_benchmarks

        try:
            counts = write_benchmarks(args.data, args.output, args.split)
        except FileNotFoundError as error:
            print(error)
            return 2
        print(f"{args.output}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return 0
    if args.command == "layers":
        from .layers import main as read_layers

        return read_layers(args.run, args.checkpoint, args.split)
    return _store(args.run)


def _store(run: Path) -> int:
    import json

    from llava_compodistill.about import environment

    from . import weights

    path = run / "models" / "manifest.json"
    if not path.is_file():
        print(f"{path} is missing: {run} is no run made with `miniature quickstart --from-scratch`.")
        return 2
    made = json.loads(path.read_text(encoding="utf-8"))
    if made.get("stored"):
        print(f"{run} used the stored weights itself: make a run with --from-scratch first.")
        return 2
    command = "llava-compodistill miniature quickstart --from-scratch"
    weights.store(run / "models", {"command": command, "environment": environment(), **made})
    print(f"stored in {weights.STORED}")
    return 0
