"""How batches come to the device: the loader pins them in memory, and nobody waits for the copy.

The Trainer pins by default (`--dataloader_pin_memory`), lists of images and what a teacher reads included, but waits
for the copy, by default (transformers 4.41 and later have a setting for it, `--accelerator_config`).
"""

from __future__ import annotations

from typing import Any


def without_waiting(loader: Any, args: Any) -> Any:
    """A data loader, as accelerate has prepared it, whose copies from pinned memory to a GPU are not waited for."""
    if args.dataloader_pin_memory and args.device.type == "cuda":
        loader._non_blocking = True
    return loader
