"""The entry point of every stage: `deepspeed --module llava_compodistill.train --stage dft …`; see scripts/."""

import sys

from .run import run_process

if __name__ == "__main__":
    sys.exit(run_process())
