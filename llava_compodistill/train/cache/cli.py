"""`llava-compodistill cache`: its own options; all others are those of training."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

EPILOG = """
All other flags are those of `llava-compodistill train` for the stage that is to be trained from the cache: they say
what the teacher reads (data, template, tokenizer, length) and what the losses need of it (layers, rows, temperature).
A training command can be pasted as it stands, also with its launcher before it:

  llava-compodistill cache --output CACHE --estimate $(DRY_RUN=1 bash scripts/dft.sh)     the size, and no more
  llava-compodistill cache --output CACHE $(DRY_RUN=1 bash scripts/dft.sh)                one GPU
  torchrun --nproc_per_node 8 -m llava_compodistill.cli cache --output CACHE $(DRY_RUN=1 bash scripts/dft.sh)
  bash scripts/dft.sh --teacher_cache CACHE                                               trains from it

Maps take most of the room: those of all rows that see the image by default, those of answers alone with
--attention_rows answer (here and in training). --per_device_train_batch_size is what the teacher reads at a time.
The same command goes on where it was stopped, on any number of GPUs.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill cache",
        usage="llava-compodistill cache --output DIR [options] [flags of training]",
        description="Run the teacher once over a data set and store what the losses need of it: its likeliest tokens\n"
        "at answer rows and its mean attention maps. Training then needs no teacher in memory (--teacher_cache DIR),\n"
        "for any number of epochs, and of students with as many layers (others: --also_for).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--top_k", type=int, default=64, metavar="K",
                        help="tokens of each answer row, beside the mass of the rest (default: %(default)s; the size "
                        "of the vocabulary keeps all)")  # fmt: skip
    parser.add_argument("--logit_bits", type=int, default=8, choices=(8, 16, 32),
                        help="bits of a log-probability (default: %(default)s; 32: float32 as it is)")  # fmt: skip
    parser.add_argument("--map_bits", type=int, default=8, choices=(4, 8, 16, 32),
                        help="bits of an entry of a map (default: %(default)s; 32: float32 as it is)")  # fmt: skip
    parser.add_argument("--also_for", action="append", default=[], metavar="STUDENT",
                        help="a further student (folder or hub name, with the same tokenizer) that is to be trained "
                        "from it: maps of the groups of teacher layers that it needs; may be repeated")  # fmt: skip
    parser.add_argument("--shard_samples", type=int, metavar="N",
                        help="samples of a shard, which is what a kill costs each process at most (default: about "
                        "256 MB of them)")  # fmt: skip
    parser.add_argument("--estimate", action="store_true", help="print the size by options, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill cache`."""
    parser = build_parser()
    options, flags = parser.parse_known_args(argv)
    if not flags:
        parser.print_help()
        return 2
    for name in ("top_k", "shard_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("llava_compodistill").setLevel(logging.INFO)
    import torch

    from ...hosts import disk
    from .make import Options, make

    try:
        with disk.explained(options.output, "it goes on with the shards that are there"):
            make(Options(**{**vars(options), "also_for": tuple(options.also_for)}), flags)
    finally:
        if torch.distributed.is_initialized():  # without waiting: who is done needs nothing of the others
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
