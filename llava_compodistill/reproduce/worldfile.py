"""`--world FILE`: which models, data and benchmarks the full-size world has. What the file does not say is the paper's
choice, in the folders where the training scripts expect it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hosts.files import read_json, read_yaml

#: The paper's averages (Tables 1 and 2): VQAv2 and VizWiz, which a server scores, are in Table 1's alone.
VQA = ("gqa", "textvqa", "mme")
VQA_OF_TABLE_1 = ("vqav2", "vizwiz", *VQA)
CR = ("sugarcrepe", "sade", "bivlc", "winoground")
HALLUCINATION = ("rbench", "reefknot")

#: Entries by name, with their defaults; None is nothing.
DEFAULTS: dict[str, Any] = {
    "students": {"default": "Qwen/Qwen1.5-1.8B", "small": "Qwen/Qwen1.5-0.5B"},
    "teachers": {"default": "./checkpoints/llava-qwen1.5-4b"},
    "templates": {"default": "qwen_1_5"},
    "tower": "google/siglip-so400m-patch14-384",
    "data": {
        "pretrain": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "pretrain_images": "./playground/data/LLaVA-Pretrain/images",
        "instruct": "./playground/data/llava_v1_5_mix665k.json",
        "images": "./playground/data",
        "scaled": None,
        "eval": "./playground/data/eval",
    },
    "benchmarks": [*VQA, *CR, *HALLUCINATION],
    "samples": {"vqa": None, "cr": "sugarcrepe", "images": "", "limit": 500},
    "device": "cuda",
    "gpus_per_run": None,
    "lora": False,
    "environment": {},
    "flags": [],
}
#: Names are free in these; in the other mappings only those of the defaults.
_FREE = ("students", "teachers", "templates", "environment")
#: What each model of `students` and `teachers` is for, beside the default.
MODELS = {
    ("students", "small"): "Table 6, Qwen1.5-0.5B",
    ("teachers", "small"): "Table 6, Qwen1.5-1.8B, the small student's",
    ("teachers", "large"): "Table 6, Qwen2.5-7B",
    ("students", "llama"): "Table 7, MobileLLaMA-1.4B",
    ("teachers", "llama"): "Table 7, MobileLLaMA-2.7B",
}


@dataclass(frozen=True)
class WorldFile:
    """A world file's entries, with the defaults.

    Attributes:
        path: the file, or None.
        students: base language models by the names of recipes: default, small, llama.
        teachers: LLaVA checkpoints by name: default, small, large, llama.
        templates: conversation templates by the student's name; `default` for those not named.
        tower: vision tower.
        data: pretrain, pretrain_images, instruct, images, scaled (Table 9's mix), eval (the benchmarks' folder).
        benchmarks: what students are evaluated on.
        samples: what the figures of attention look at: vqa, cr (benchmarks or files), images (of files), limit.
        device: cuda or cpu.
        gpus_per_run: None for all of the machine's, one run at a time.
        lora: whether DFT and SFT train LoRA.
        environment: further variables of the training scripts.
        flags: further flags of all stages.
    """

    path: Path | None
    students: Mapping[str, str]
    teachers: Mapping[str, str]
    templates: Mapping[str, str]
    tower: str
    data: Mapping[str, str | None]
    benchmarks: tuple[str, ...]
    samples: Mapping[str, Any]
    device: str
    gpus_per_run: int | None
    lora: bool
    environment: Mapping[str, str]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path else "a world file (--world FILE)"

    def template(self, student: str) -> str:
        """The conversation template of a student."""
        return self.templates.get(student, self.templates["default"])


def read_world_file(path: Path | None) -> WorldFile:
    """Read a world file; None gives the defaults.

    Raises:
        DataError: naming the file, the entry and its value.
    """
    content = {} if path is None else _parsed(path)
    for name in content:
        if name not in DEFAULTS:
            raise DataError(f"{path}: unknown entry {name}; there are {', '.join(DEFAULTS)}.")
    values = {name: _merged(name, default, content.get(name, default), path) for name, default in DEFAULTS.items()}
    for name in ("students", "teachers", "templates"):
        if "default" not in values[name]:
            raise DataError(f"{path}: {name} has no `default`.")
    for name in ("pretrain", "pretrain_images", "instruct", "images", "eval"):
        if values["data"][name] is None:
            raise DataError(f"{path}: data.{name} is empty; leave it out for {DEFAULTS['data'][name]}.")
    if values["device"] not in ("cuda", "cpu"):
        raise DataError(f"{path}: device must be cuda or cpu, is {values['device']!r}.")
    for name, value in (("gpus_per_run", values["gpus_per_run"]), ("samples.limit", values["samples"]["limit"])):
        if value is not None and (type(value) is not int or value < 1):
            raise DataError(f"{path}: {name} must be a number of 1 or more, is {value!r}.")
    lists = {name: tuple(map(str, values.pop(name))) for name in ("benchmarks", "flags")}
    return WorldFile(path=path, **values, **lists)


def _parsed(path: Path) -> dict[str, Any]:
    read = read_json if path.suffix == ".json" else read_yaml
    content = read(path, option="--world ")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"--world {path}: must hold entries such as {', '.join(DEFAULTS)}.")
    return content


def _merged(name: str, default: Any, value: Any, path: Path | None) -> Any:
    """An entry's value; mappings keep the defaults of what they do not name, and null takes a default away."""
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise DataError(f"{path}: {name} must be a mapping of names to values, is {value!r}.")
        if name not in _FREE:
            unknown = [str(key) for key in value if key not in default]
            if unknown:
                raise DataError(f"{path}: unknown {name}.{unknown[0]}; there are {', '.join(default)}.")
        for key, given in value.items():
            if isinstance(given, (dict, list)):
                raise DataError(f"{path}: {name}.{key} must be a single value, is {given!r}.")
        merged = {**default, **value}
        if name in _FREE:
            return {str(key): str(given) for key, given in merged.items() if given is not None}
        return {key: given if given is None or key == "limit" else str(given) for key, given in merged.items()}
    if isinstance(default, list):
        if not isinstance(value, list):
            raise DataError(f"{path}: {name} must be a list, is {value!r}.")
        return value
    if name == "lora" and type(value) is not bool:
        raise DataError(f"{path}: lora must be true or false, is {value!r}.")
    if isinstance(default, str) and not isinstance(value, str):
        raise DataError(f"{path}: {name} must be a text, is {value!r}.")
    return value
