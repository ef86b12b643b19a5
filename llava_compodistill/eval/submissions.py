"""The files that GQA's scorer and the servers of VQAv2 and VizWiz take, from LLaVA's answers.

LLaVA's repository has scripts for this (scripts/convert_*.py), its package on the registry leaves them out. Where they
are missing scripts/eval/*.sh call these, which take the same flags and write the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import RecordsError
from .benchmarks import registered
from .benchmarks.llava import LlavaBenchmark


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.submissions", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    converters = [benchmark.converter for benchmark in registered(LlavaBenchmark).values() if benchmark.converter]
    for converter in converters:
        command = commands.add_parser(converter.command)
        for flag, kind in converter.flags.items():
            command.add_argument(flag, type=kind, required=True)
    args = parser.parse_args(argv)
    (converter,) = (converter for converter in converters if converter.command == args.command)
    try:
        path, entries = converter.convert(args)
    except RecordsError as error:
        print(error, file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
