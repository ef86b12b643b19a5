"""One cell of the matrix: a way to train on two processes, and a stage that begins where another has ended."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_compodistill.about import git_commit

from . import modes
from .ranks import Ranks
from .world import MIDDLE, STEPS, Link, World

#: What may be apart, relatively, by rounding: losses and weights (fp32), what LLaVA's loader makes of them.
TOLERANCE = {"losses": 1e-4, "weights": 1e-4, "moved": 5e-3, "logits": 1e-3, "resumed": 1e-5}
SAMPLES_A_STEP = 4
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
#: New weights (an adapter's, a LoRA's) are drawn from the same numbers in every mode: under ZeRO-3, a model that is
#: loaded has drawn others by then.
SAME_NUMBERS = """
import torch
from llava_compodistill.pair import student

def seeded(original):
    def call(*args, **kwargs):
        torch.manual_seed(1)
        return original(*args, **kwargs)
    return call

torch.nn.Linear.reset_parameters = seeded(torch.nn.Linear.reset_parameters)
student.add_lora = seeded(student.add_lora)
"""
LOAD = """
import torch
from PIL import Image
from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.model import llava_core
register()
import llava.model.builder
found = {{}}
for name, folder, base in {folders!r}:
    tokenizer, model, processor, _ = llava.model.builder.load_pretrained_model(
        folder, base, "llava-" + name, device="cpu", device_map="cpu"
    )
    with Image.open({image!r}) as image:
        pixels = processor.preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[20, 30, -200, 40, 50, 60]])
    with torch.no_grad():
        found[name] = model(input_ids=ids, images=pixels, use_cache=False).logits[0]
torch.save(found, {target!r})
"""


@dataclass
class Cell:
    """What came of a cell; differences are relative, None where a run has failed.

    Attributes:
        mode, run: the cell.
        losses: of all terms and steps, from one process' run.
        weights: the largest difference over the largest weight, by tensor.
        moved: the largest difference over how far training has moved any weight.
        grad_norm: of the gradients' norm, where the log has it.
        resumed: weights, from those of the run that was not interrupted; `resumed_losses` likewise.
        at_end: whether a run whose last checkpoint is there, and whose result is not, ends with the same weights.
        logits: of what LLaVA's builder loads, from one process' checkpoint.
        seconds: of the run, its two processes side by side.
        problem: the end of what a run that failed has said.
    """

    mode: str
    run: str
    losses: float | None = None
    weights: float | None = None
    moved: float | None = None
    grad_norm: float | None = None
    resumed: float | None = None
    resumed_losses: float | None = None
    at_end: float | None = None
    logits: float | None = None
    seconds: float | None = None
    problem: str | None = None

    @property
    def holds(self) -> bool:
        """Whether everything is equal within rounding."""
        limits = {**TOLERANCE, "resumed_losses": TOLERANCE["resumed"], "at_end": TOLERANCE["resumed"]}
        values = asdict(self)
        return self.problem is None and all(
            values[name] is not None and values[name] <= limits[name] for name in limits
        )


class Matrix:
    """Runs cells in a folder, in which one that is done is not run again.

    Args:
        root: the world's folder and the runs'.
        ranks: started.
    """

    def __init__(self, world: World, ranks: Ranks):
        self.world, self.ranks, self.root = world, ranks, world.root
        self._loaded: set[str] = set()

    def reference(self, link: Link) -> str | None:
        """The run of one process. Returns its problem, None where there is none."""
        return self._train("one", link, "one")[0]

    def cell(self, mode: str, link: Link, resumed_from: Sequence[int] = (MIDDLE, STEPS), before: str = "") -> Cell:
        """Run a cell: unbroken, and resumed from the checkpoints of some steps.

        Args:
            before: the mode whose earlier stage it begins with; by default its own.
        """
        done = self.root / mode / f"{link.name}.json"
        if done.exists():
            return Cell(**json.loads(done.read_text()))
        cell = Cell(mode, link.name)
        cell.problem, cell.seconds = self._train(mode, link, mode, before)
        if cell.problem is None:
            self._compare(cell, self.root / mode / link.name, self.root / "one" / link.name)
            for step in resumed_from:
                if cell.problem is None:
                    self._resume(cell, mode, link, step, before)
        done.write_text(json.dumps(asdict(cell)))
        return cell

    def load(self, mode: str, links: list[Link], cells: Mapping[str, Cell]) -> None:
        """Load what a mode has saved, by LLaVA's builder, and compare its logits with those of one process'."""
        for name in ("one", mode):
            if name in self._loaded:
                continue
            self._loaded.add(name)
            base = str(self.root / "models" / "qwen-student")
            folders = [
                (link.name, str(self.root / name / link.name), None if link.kind == "full" else base)
                for link in links
                if (self.root / name / link.name / "trainer_state.json").exists()
            ]
            image = next((self.root / "data" / "images").rglob("*.png"))
            code = LOAD.format(folders=folders, image=str(image), target=str(self.root / f"{name}.logits"))
            done = self.ranks.python(code, self.root / f"{name}-load.log")
            if not done.ok:
                for cell in cells.values():
                    cell.problem = cell.problem or _last_words(done.text)
                return
        import torch

        one, found = (torch.load(self.root / f"{name}.logits", weights_only=True) for name in ("one", mode))
        for name, cell in cells.items():
            if name in found:
                cell.logits = apart({name: found[name]}, {name: one[name]})[0]

    def _train(self, mode: str, link: Link, place: str, before: str = "") -> tuple[str | None, float]:
        out = self.root / place / link.name
        if (out / "trainer_state.json").exists():
            return None, 0.0
        out.parent.mkdir(exist_ok=True)
        processes = 1 if mode == "one" else 2
        options = {"gradient_accumulation_steps": SAMPLES_A_STEP // processes}
        options |= {} if mode == "one" else modes.flags(mode, self.root)
        earlier = self.root / (before or mode)
        code = SAME_NUMBERS + ("" if mode == "one" else modes.prelude(mode))
        log = self.root / place / f"{link.name}.log"
        done = self.ranks.train(self.world.flags(link, earlier, out, **options), processes, log, code)
        return (None if done.ok else _last_words(done.text)), done.seconds

    def _resume(self, cell: Cell, mode: str, link: Link, step: int, before: str) -> None:
        whole = self.root / mode / link.name
        place = f"{mode}-resumed-{step}"
        out = self.root / place / link.name
        shutil.rmtree(out, ignore_errors=True)  # of a matrix that was stopped
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
        cell.problem, _ = self._train(mode, link, place, before)
        if cell.problem is not None:
            cell.problem = f"resumed from step {step}: {cell.problem}"
            return
        weights = apart(weights_in(out), weights_in(whole))[0]
        if step == STEPS:
            cell.at_end = weights
        else:
            cell.resumed, cell.resumed_losses = weights, _losses_apart(read_log(out), read_log(whole))[0]

    def _compare(self, cell: Cell, found: Path, expected: Path) -> None:
        cell.losses, cell.grad_norm = _losses_apart(read_log(found), read_log(expected))
        theirs = weights_in(expected)
        cell.weights, difference = apart(weights_in(found), theirs)
        moved = apart(weights_in(expected / f"checkpoint-{MIDDLE}"), theirs)[1]
        cell.moved = difference / moved if moved else math.inf


def made_with() -> dict[str, Any]:
    """The commit and the versions of a report."""
    return {
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def weights_in(folder: Path) -> dict[str, Any]:
    """The weights in a checkpoint or result of any kind, by name."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name in ("model", "adapter_model"):
        if (folder / f"{name}.safetensors").exists():
            found |= load_file(folder / f"{name}.safetensors")
    for name in ("mm_projector", "non_lora_trainables"):
        if (folder / f"{name}.bin").exists():
            found |= torch.load(folder / f"{name}.bin", map_location="cpu", weights_only=True)
    return found


def apart(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, float]:
    """(largest difference over the tensor's largest value, largest difference); infinite for other names."""
    if found.keys() != expected.keys() or not found:
        return math.inf, math.inf
    relative = absolute = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return math.inf, math.inf
        difference = float((found[name].float() - value.float()).abs().max())
        if not math.isfinite(difference):  # max() would pass over NaN
            return math.inf, math.inf
        relative = max(relative, difference / max(float(value.abs().max()), 1e-6))
        absolute = max(absolute, difference)
    return relative, absolute


def _losses_apart(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> tuple[float, float | None]:
    """(of the terms, of the gradients' norm)."""
    if [entry["step"] for entry in found] != [entry["step"] for entry in expected]:
        return math.inf, None
    largest = {"losses": 0.0, "grad_norm": 0.0 if found and "grad_norm" in found[0] else None}
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "lm", "kl", "attention", "attention_similarity", "grad_norm"):
            if (name in ours) != (name in theirs):
                return math.inf, None
            if name in theirs:
                kind = name if name == "grad_norm" else "losses"
                difference = abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-2)
                largest[kind] = max(largest[kind] or 0.0, difference if math.isfinite(difference) else math.inf)
    return largest["losses"], largest["grad_norm"]


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Warning" not in line]
    errors = [line for line in lines if "rror" in line]
    return " | ".join([*errors[-2:], *lines[-1:]])[-600:]
