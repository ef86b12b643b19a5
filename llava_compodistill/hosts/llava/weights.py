"""Files of weights, read without running anything that a pickle may hide; a damaged one is named. LoRA folders of any
PEFT."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import CheckpointError, CompoDistillError


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read a `.bin` of tensors without running any code that a pickle may hide."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise a dozen kinds
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} must hold weights by their names, holds something else ({_kind(weights)}).")
    refuse_broken_weights(weights.items(), path)
    return weights


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    apart = {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}
    return ", ".join(f"{name!r} is a {type(value).__name__}" for name, value in apart.items())[:200] or "other names"


def read_tensors(folder: str, stem: str) -> dict[str, torch.Tensor]:
    """Read STEM.safetensors of a folder, or STEM.bin where there is none."""
    path = os.path.join(folder, f"{stem}.safetensors")
    if not os.path.isfile(path):
        return read_weights(os.path.join(folder, f"{stem}.bin"))
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    refuse_broken_weights(weights.items(), path)
    return weights


#: Values looked at at a time, which bounds the memory that the look takes.
_AT_ONCE = 1 << 24


def refuse_broken_weights(weights: Iterable[tuple[str, torch.Tensor]], path: str) -> None:
    """Refuse weights that are NaN or infinite: a model of them answers nonsense, and says nothing.

    One pass over what lies in memory; what does not (on the meta device, partitioned by ZeRO-3) and weights of 8 or 4
    bits are not looked at.

    Args:
        weights: (name, values).
        path: the file or folder that they come from, for the message.

    Raises:
        CheckpointError: naming the first of them.
    """
    for name, value in weights:
        value = value.detach()
        if not value.is_floating_point() or value.element_size() < 2 or value.is_meta:
            continue
        if not all(bool(part.isfinite().all()) for part in value.flatten().split(_AT_ONCE)):
            raise CheckpointError(
                f"{path}: {name} holds values that are NaN or infinite (in {str(value.dtype).removeprefix('torch.')}):"
                " the file is damaged, or its training diverged. Take another checkpoint."
            )


@contextlib.contextmanager
def loading(path: str, config: str = "") -> Iterator[None]:
    """Inside, what a folder's files make transformers and PEFT stumble over is an error that names the folder, and the
    file where one cannot be read. What the machine lacks (memory, a package) is left as it is, and so is all that is
    said of a name on the hub.

    Args:
        config: the file that says what is made of the folder, where it lies elsewhere.

    Raises:
        CheckpointError: naming them.
    """
    try:
        yield
    except (CompoDistillError, ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged file makes of them does not always name it
        if not os.path.isdir(path) or _is_of_the_machine(error):
            raise
        refuse_damaged_weights(path)
        how, whose = (f" as {config} describes it", "that") if config else ("", "its")
        raise CheckpointError(
            f"{path} cannot be loaded{how} ({type(error).__name__}: {error}). Its files are damaged, or {whose} "
            "configuration is that of another model."
        ) from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether memory or a device is lacking, for which torch has no class of its own."""
    words = "DefaultCPUAllocator", "No CUDA GPUs", "CUDA error", "NVIDIA driver"
    lacking = getattr(error, "errno", None) in (errno.ENOMEM, errno.EMFILE)
    return lacking or any(text in str(error) for text in words)


def refuse_damaged_weights(folder: str) -> None:
    """Raise CheckpointError for a folder's first file of weights that cannot be read."""
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else ()):
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            read_tensors(folder, stem)
        elif suffix == ".bin" and name.startswith(("pytorch_model", "adapter_model")):
            read_weights(os.path.join(folder, name))


#: Keys of newer releases of PEFT that change nothing by themselves, whatever their value.
_SAYS_NOTHING = {"peft_version", "runtime_config", "qalora_group_size", "megatron_core"}


def portable_lora_config(values: Mapping[str, Any], path: str | os.PathLike) -> Any:
    """The installed PEFT's LoraConfig of an adapter_config.json (its `values`, and its `path` for messages).

    Each release writes all the keys that it has. PEFT 0.9, which goes with transformers 4.37, fails on those that it
    does not know, newer ones warn: here those are left out that are switched off.

    Raises:
        CheckpointError: naming unknown keys that change what the model computes, and for values that make no LoRA.
    """
    import peft

    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {values.get('peft_type')!r} is no LORA.")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    unknown = {name: value for name, value in values.items() if name not in known | _SAYS_NOTHING}
    used = [f"{name} {value!r:.60}" for name, value in unknown.items() if value not in (None, False, [], {}, "")]
    if used:
        raise CheckpointError(
            f"{path} was written by another PEFT and uses what the installed {peft.__version__} does not know: "
            f"{', '.join(used)}. Load it with a newer PEFT."
        )
    try:
        return peft.LoraConfig(**{name: values[name] for name in values if name in known - {"peft_type"}})
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no LoRA can be made of it ({error}).") from None
