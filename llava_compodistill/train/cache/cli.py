"""`llava-compodistill cache`: its own options; all others are those of training."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

EPILOG = """
All other flags are those of `llava-compodistill train` for the stage that will be trained from the cache. They
determine what the teacher reads (data, template, tokenizer, length) and what the losses need from the teacher (layers,
rows, temperature). A training command can be pasted unchanged, including the launcher in front of it:

  llava-compodistill cache --output CACHE --estimate $(DRY_RUN=1 bash scripts/dft.sh)     the size, and no more
  llava-compodistill cache --output CACHE $(DRY_RUN=1 bash scripts/dft.sh)                one GPU
  torchrun --nproc_per_node 8 -m llava_compodistill.cli cache --output CACHE $(DRY_RUN=1 bash scripts/dft.sh)
  bash scripts/dft.sh --teacher_cache CACHE                                               trains from it

Attention maps take most of the space. By default they hold all rows that can attend to the image, and with
--attention_rows answer (here and in training) only the rows that predict an answer token.
--per_device_train_batch_size is the number of samples that the teacher reads at a time. If the command was stopped,
run it again to continue, on any number of GPUs.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-compodistill cache",
        usage="llava-compodistill cache --output DIR [options] [flags of training]",
        description="Run the teacher once over a data set and store what the losses need: its likeliest tokens at\n"
        "answer rows (positions that predict an answer token) and its mean attention maps. With --teacher_cache DIR,\n"
        "training then needs no teacher in memory, for any number of epochs and of students with the same number of\n"
        "layers (for other students: --also_for).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--top_k", type=int, default=64, metavar="K",
                        help="tokens stored for each answer row, in addition to the probability mass of the rest "
                        "(default: %(default)s; the size of the vocabulary keeps all)")  # fmt: skip
    parser.add_argument("--logit_bits", type=int, default=8, choices=(8, 16, 32),
                        help="bits per log-probability (default: %(default)s; 32: float32, exact)")  # fmt: skip
    parser.add_argument("--map_bits", type=int, default=8, choices=(4, 8, 16, 32),
                        help="bits per map entry (default: %(default)s; 32: float32, exact)")  # fmt: skip
    parser.add_argument("--also_for", action="append", default=[], metavar="STUDENT",
                        help="another student (folder or hub name, with the same tokenizer) to be trained from the "
                        "cache: also store maps of the teacher layers that this student needs; may be "
                        "repeated")  # fmt: skip
    parser.add_argument("--shard_samples", type=int, metavar="N",
                        help="samples per shard; a process that is killed loses at most one shard (default: about "
                        "256 MB of samples)")  # fmt: skip
    parser.add_argument("--estimate", action="store_true", help="print the size for several options, and stop")
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
