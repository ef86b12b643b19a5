"""The console command `llava-compodistill`: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..about import __version__
from ..errors import CompoDistillError


@dataclass(frozen=True)
class Command:
    """A subcommand: `function` of `module` gets the arguments after its name and returns the exit status or None.

    With `through_argv` the function takes no argument and reads `sys.argv`, as HfArgumentParser does.
    """

    module: str
    function: str
    help: str
    through_argv: bool = False


COMMANDS: dict[str, Command] = {
    "env": Command(
        "llava_compodistill.cli.env_report", "main", "print versions, hardware and optional packages, for bug reports"
    ),
    "init": Command(
        "llava_compodistill.hosts.llava.checkout", "main", "copy our scripts and patches into a LLaVA checkout"
    ),
    "run": Command("llava_compodistill.hosts.llava.runner", "main", "run a LLaVA module with the plugin registered"),
    "plan": Command(
        "llava_compodistill.train.plan.cli", "main", "predict memory, micro-batch and hours of a run from config files"
    ),
    "check": Command(
        "llava_compodistill.train.preflight.cli",
        "main",
        "check data, images and models before training, without weights",
    ),
    "cache": Command(
        "llava_compodistill.train.cache.cli", "main", "store the teacher's targets for a data set, to train without it"
    ),
    "train": Command("llava_compodistill.train.run", "main", "train one stage (flags as in LLaVA's scripts)", True),
    "eval": Command("llava_compodistill.eval.cli", "main", "run compositional and hallucination benchmarks"),
    "merge": Command("llava_compodistill.train.merging", "main", "merge a LoRA student into a whole checkpoint"),
    "compare": Command("llava_compodistill.eval.compare", "main", "compare models, with intervals and p-values"),
    "analyze": Command(
        "llava_compodistill.analysis.cli", "main", "plot where models attend: the paper's figures of attention"
    ),
    "reproduce": Command(
        "llava_compodistill.reproduce.cli", "main", "train and report the rows of the paper's tables"
    ),
    "sade": Command(
        "llava_compodistill.eval.sade_sources", "main", "convert SADE's sources into the file that eval reads"
    ),
    "miniature": Command(
        "llava_compodistill.cli.miniature",
        "main",
        "run the miniature world: quickstart, data, benchmarks, layers, store-weights",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command itself; what follows a subcommand's name is left to the subcommand."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="llava-compodistill",
        description="CompoDistill for LLaVA: distil multimodal LLMs by aligning their visual attention.",
        epilog=f"commands:\n{table}\n\nllava-compodistill <command> --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llava-compodistill {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def call(name: str, arguments: Sequence[str]) -> int:
    """Import and run one subcommand."""
    command = COMMANDS[name]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: LLaVA is found in the checkout we stand in
    function = getattr(importlib.import_module(command.module), command.function)
    if not command.through_argv:
        return function(list(arguments)) or 0
    saved = sys.argv
    sys.argv = [f"llava-compodistill {name}", *arguments]
    try:
        status = function()
    finally:
        sys.argv = saved
    return status if isinstance(status, int) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        parser.print_help()
        return 2
    # The name alone is parsed here: argparse would take a --help meant for the subcommand.
    options = parser.parse_args(argv[:1])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a message may name a file that UTF-8 cannot write
    try:
        return call(options.command, argv[1:])
    except KeyboardInterrupt:
        print(f"llava-compodistill {options.command}: stopped.", file=sys.stderr)
        return 130
    except CompoDistillError as error:
        print(f"llava-compodistill {options.command}: error: {error}", file=sys.stderr)
        return 2
