"""What a cache depends on beside its samples, and what a run that trains from it has to agree with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CacheError
from ...hosts.files import read_object
from .. import manifest
from ..teacher_text import MARKERS
from .entries import What

#: What is told of each setting where it differs.
_NAMES = {
    "teacher": "the teacher (--teacher_model_path)",
    "teacher_files": "the teacher's weights or its config",
    "base": "the teacher's base (--teacher_model_base)",
    "template": "the conversation template (--version)",
    "tokenizer": "the student's tokenizer (--model_name_or_path)",
    "vocab": "the tokens that both models share",
    "limit": "--model_max_length",
    "aspect_ratio": "--image_aspect_ratio",
    "tower": "the vision tower (--vision_tower)",
    "tower_files": "the vision tower's weights",
    "patches": "visual tokens of an image (--vision_tower)",
    "samples": "the number of samples (--data_path)",
    "temperature": "--kd_temperature",
    "groups": "the groups of teacher layers (--student_layers, --teacher_layers, --layer_matching, and the depth of "
    "the student)",
    "rows": "--attention_rows",
    "answers": "whether it holds distributions at answer rows",
}
#: What a cache that is gone on with has to agree in, in addition.
_OF_MAKING = ("top_k", "logit_bits", "map_bits", "shard_samples", "teacher_dtype", "quantised")
_WEIGHTS = (".safetensors", ".bin")


def describe(
    what: What,
    *,
    teacher: str,
    base: str | None,
    tower: str,
    template: str,
    tokenizer: Any,
    limit: int,
    aspect_ratio: str,
    patches: int,
    samples: int | None = None,
) -> dict[str, Any]:
    """What a cache of these would be, as JSON holds it.

    Args:
        teacher, base: as --teacher_model_path, and the language model of one that is a LoRA or an adapter.
        tower: the teacher's vision tower, as it is found here.
        template: the name of the conversation template.
        tokenizer: the student's, prepared.
        limit: --model_max_length.
        aspect_ratio: of images.
        patches: visual tokens of an image.
        samples: of the data; None where they are not counted yet.
    """
    found = {
        "teacher": _place(teacher),
        "teacher_files": _fingerprint(teacher) | _fingerprint(base, "base/"),
        "base": None if base is None else _place(base),
        "tower": _place(tower),
        "tower_files": _fingerprint(tower),
        "template": template,
        "tokenizer": digest(sorted(entry for entry in tokenizer.get_vocab().items() if entry[0] not in MARKERS)),
        "vocab": what.vocab,
        "limit": limit,
        "aspect_ratio": aspect_ratio,
        "patches": patches,
        "samples": samples,
        "answers": what.answers,
        "temperature": what.temperature,
        "groups": [list(group) for group in what.groups],
        "rows": what.rows,
        "top_k": what.top_k,
        "logit_bits": what.logit_bits,
        "map_bits": what.map_bits,
    }
    return json.loads(json.dumps(found))


def check_sound(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that no command has written.

    Raises:
        CacheError: naming the file and the entry.
    """
    kinds = {"answers": bool, "groups": list, "rows": str, "temperature": float, "teacher_files": dict}
    kinds |= dict.fromkeys(("top_k", "logit_bits", "map_bits", "vocab", "limit", "patches", "samples"), int)
    kinds |= {"tower_files": dict}
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise CacheError(
                f"{path} is damaged ({name} is {settings.get(name)!r:.60}). Make the cache anew in another folder."
            )
    layers = [layer for group in settings["groups"] for layer in (group if isinstance(group, list) else [None])]
    if not all(isinstance(layer, int) for layer in layers):
        raise CacheError(f"{path} is damaged (groups must be lists of layers). Make the cache anew in another folder.")


def held(settings: Mapping[str, Any]) -> What:
    """What a cache of these settings holds of each sample."""
    return What(
        answers=settings["answers"],
        top_k=settings["top_k"],
        logit_bits=settings["logit_bits"],
        temperature=settings["temperature"],
        vocab=settings["vocab"],
        groups=tuple(tuple(group) for group in settings["groups"]),
        rows=settings["rows"],
        map_bits=settings["map_bits"],
    )


def refuse_others(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a cache of other settings.

    Raises:
        CacheError: naming each, with both values.
    """
    names = [name for name in (*_NAMES, *_OF_MAKING) if there.get(name) != wanted.get(name)]
    if names:
        raise CacheError(
            f"--output {folder} holds a cache of other settings:\n{_lines(names, there, wanted)}\nGive its settings "
            "to go on with it, or name another folder."
        )


def refuse_unfit(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to train from a cache of another teacher, other readings of samples, or without what the terms need.

    Args:
        wanted: what `describe` gives for the run; a cache may hold more.

    Raises:
        CacheError: naming each difference, with both values.
    """
    names = []
    for name in _NAMES:
        mine, theirs = wanted.get(name), there.get(name)
        if name == "answers":
            differs = mine and not theirs
        elif name == "temperature":
            differs = wanted["answers"] and mine != theirs
        elif name == "groups":
            differs = any(group not in theirs for group in mine)
        elif name == "rows":
            differs = wanted["groups"] and theirs not in ("all", mine)
        elif name in ("teacher", "tower"):  # a folder may have been moved: its files tell
            differs = mine != theirs and not (there[f"{name}_files"] and wanted[f"{name}_files"])
        elif name == "base":
            files = [any(file.startswith("base/") for file in one["teacher_files"]) for one in (there, wanted)]
            differs = mine != theirs and not all(files)
        elif name in ("teacher_files", "tower_files"):  # the teacher's language model may be missing here
            differs = any(theirs.get(file) != value for file, value in mine.items()) and bool(theirs)
        elif name == "samples":
            differs = mine is not None and mine != theirs
        else:
            differs = mine != theirs
        if differs:
            names.append(name)
    if names:
        raise CacheError(
            f"--teacher_cache {folder} is not a cache for this run:\n{_lines(names, there, wanted)}\nTrain with the "
            "cache's settings, make another cache with this run's (`llava-compodistill cache`), or leave "
            "--teacher_cache out."
        )


def _lines(names: list[str], there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    told = {name: _NAMES.get(name, f"--{name}") for name in names}
    return "\n".join(
        f"  {text}: {_short(there.get(name))} there, {_short(wanted.get(name))} in this command"
        for name, text in told.items()
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _place(path: str) -> str:
    return os.path.realpath(path) if os.path.isdir(path) else path


def _fingerprint(path: str | None, prefix: str = "") -> dict[str, list]:
    """Of a folder's files of weights, size and a hash, and a hash of its config; of a name on the hub nothing."""
    if path is None or not os.path.isdir(path):
        return {}
    files = sorted(file for file in Path(path).iterdir() if file.suffix in _WEIGHTS and file.name not in _NO_WEIGHTS)
    found = {f"{prefix}{file.name}": [file.stat().st_size, _hash_of_tensors(file)] for file in files}
    config = Path(path, "config.json")
    if config.is_file():
        values = {name: value for name, value in read_object(config).items() if name not in _NOT_OF_THE_MODEL}
        found[f"{prefix}{config.name}"] = [digest(values)]
    return found


def _hash_of_tensors(file: Path) -> str:
    """Of the header and both ends of every tensor: training changes a tensor all over, and reading it all takes
    minutes. Of a file that is not in safetensors' format, of its ends alone."""
    found = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little")) if file.suffix == ".safetensors" else b"{}"
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            found.update(header)
            for start, stop in sorted(tensors):
                for place in {start, max(start, stop - _OF_TENSOR)}:
                    stream.seek(8 + len(header) + place)
                    found.update(stream.read(min(_OF_TENSOR, stop - place)))
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return manifest.hash_of_ends(file)
    return found.hexdigest() if file.suffix == ".safetensors" else manifest.hash_of_ends(file)


#: Bytes at either end of a tensor.
_OF_TENSOR = 4096
_NO_WEIGHTS = ("training_args.bin", "distillation.bin")
#: What a config says of where and by what it was written.
_NOT_OF_THE_MODEL = {
    "_name_or_path",
    "dtype",
    "mm_vision_tower",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vision_tower",
}


def digest(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
