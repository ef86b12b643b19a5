"""`llava-compodistill check`: its own options; all others are those of training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError

EPILOG = """
All other flags are those of `llava-compodistill train`. A training command can be pasted unchanged, including the
launcher in front of it:

  llava-compodistill check --data_path data.json --image_folder images       the files alone
  llava-compodistill check $(DRY_RUN=1 bash scripts/dft.sh) --images         all that the script would start

Exit status: 0 ready; 1 ready if some samples are left out (the command that does so is printed); 2 cannot train.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill check",
        usage="llava-compodistill check [options] --data_path FILE --image_folder FOLDER [flags of training]",
        description="Before training, find what would make it fail: problems with files, samples, images and models. "
        "No weights are read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", action="store_true", help="also decode every image file")
    parser.add_argument("--lengths", default=None, metavar="N|all", help="how many samples to tokenize, evenly spread "
                        "(default: 100000; all with --write_skip)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON; - prints it instead")
    parser.add_argument(
        "--write_skip",
        metavar="FILE",
        help="write a list of the samples to leave out, for training's flag --skip_samples",
    )
    parser.add_argument(
        "--without_weights",
        action="store_true",
        help="accept model folders that contain only a config and a tokenizer",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill check`."""
    parser = build_parser()
    options, flags = parser.parse_known_args(argv)
    if not flags:
        parser.print_help()
        return 2
    measured = _measured(options.lengths)
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers {options.workers}: must be at least 1.")
    from rich.console import Console

    from .check import EXIT, MEASURED, Check, Options
    from .processes import usable_cores
    from .show import show

    if options.lengths is None and not options.write_skip:
        measured = MEASURED
    wanted = Options(
        options.images, options.workers or usable_cores(), measured, options.write_skip, options.without_weights
    )
    report = Check(flags, wanted, Console(stderr=True)).run()
    text = json.dumps(report.as_json(), indent=2, ensure_ascii=False, default=str)
    if options.json == "-":
        print(text)
    else:
        show(report, Console())
        if options.json:
            _write(options.json, text)
    return EXIT[report.verdict]


def _measured(value: str | None) -> int | None:
    if value is None or value == "all":
        return None
    if not value.isdecimal() or not int(value):
        raise DataError(f"--lengths {value}: must be a number of samples, or all.")
    return int(value)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        raise DataError(f"--json {path}: cannot be written ({error}).") from None


if __name__ == "__main__":
    sys.exit(main())
