"""What the pickles of a checkpoint would run: the trainer's state is read before anything of it is loaded.

Weights, and where torch can the optimizer's, scheduler's and random states, are loaded as tensors and plain values
alone. DeepSpeed's `global_step*/*.pt` are pickles of objects, and torch before 2.6 loads the others as such, too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

#: "module name" of what a trainer's state consists of: tensors, NumPy's random state, DeepSpeed's own records.
_KNOWN = re.compile(
    r"collections (OrderedDict|defaultdict)"
    r"|(__builtin__|builtins) (set|frozenset|complex|int|float|list|dict|tuple|bytearray)"
    r"|_codecs encode"
    r"|torch [A-Za-z0-9]*Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch (Size|device|dtype|Tensor|[a-z]+[0-9]+(_[a-z0-9]+)?)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|device_tensor_from_numpy)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.serialization _get_layout"
    r"|numpy (ndarray|dtype)|numpy\.dtypes [A-Za-z0-9]+DType"
    r"|numpy\._?core\.multiarray (_reconstruct|scalar)"
    r"|deepspeed\.runtime\.fp16\.loss_scaler (LossScaler|DynamicLossScaler)"
    r"|deepspeed\.runtime\.zero\.config ZeroStageEnum"
    r"|deepspeed\.utils\.tensor_fragment (fragment_address|tensor_fragment)"
)


@contextlib.contextmanager
def loads_tensors_alone() -> Iterator[None]:
    """Inside, torch.load runs no code from a file, unless it is told to.

    Remove when transformers 4.37 goes: newer releases ask for it, and torch from 2.6 on does so by itself.
    """
    original = torch.load

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("map_location", "")).startswith("cpu:"):
            kwargs["map_location"] = "cpu"  # 4.37's of several processes without a GPU, which torch does not know
        return original(*args, **{"weights_only": True, **kwargs})

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


def globals_of(path: Path) -> set[str]:
    """What a file written by torch.save would import: "module name". Its tensors are not read.

    What cannot be told is given as a text in brackets, which is in no list of what is known.
    """
    found: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != len(set(names)):
            found.add("[an entry that is there twice]")
        records = [name for name in names if name.endswith(".pkl")]
        if [name.rpartition("/")[2] for name in records] != ["data.pkl"]:
            found.add("[another format than torch.save's]")
        for record in records:
            try:
                for code, argument, _ in pickletools.genops(archive.read(record)):
                    if code.name in ("GLOBAL", "INST"):
                        found.add(str(argument))
                    elif code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                        found.add(f"[{code.name}]")  # torch.save uses none of them
            except Exception as error:  # a pickle that cannot be taken apart
                found.add(f"[{record} is no pickle: {error}]")
    return found


def refuse_unknown(folder: Path, trusted: bool) -> None:
    """Read what the pickles in a checkpoint would import, before they are loaded.

    Args:
        trusted: what `--trust_checkpoint` says.

    Raises:
        CheckpointError: naming the files and what they import, unless the checkpoint is trusted.
    """
    unknown = {}
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():  # which this would not look through, and DeepSpeed would
            unknown[path] = ["[a link to another folder]"]
    for path in sorted({*folder.rglob("*.pt"), *folder.glob("*.pth")}):
        try:
            found = sorted(name for name in globals_of(path) if not _KNOWN.fullmatch(name))
        except zipfile.BadZipFile:
            found = ["[another format than torch.save's]"]
        if found:
            unknown[path] = found
    if not unknown:
        return
    lines = "\n".join(f"  {path.relative_to(folder)}: {', '.join(names)}" for path, names in unknown.items())
    if not trusted:
        raise CheckpointError(
            f"{folder} holds more than a trainer's state: to load it would run code from its files:\n{lines}\nIf you "
            "know who made it, add --trust_checkpoint True; else name another --output_dir, or remove the checkpoint."
        )
    logger.warning("%s is trusted (--trust_checkpoint True), although its files run code:\n%s", folder, lines)
