"""The full-size world: the models and data of a world file, the training scripts as a user runs them, `eval`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import CompoDistillError, DataError
from ..eval.benchmarks import get, registered
from ..eval.benchmarks.base import EngineBenchmark
from ..eval.benchmarks.llava import LlavaBenchmark
from ..eval.checkpoint import check_checkpoint, template_of
from ..eval.summaries import read_summary
from ..hosts.files import read_object
from ..methods import find_method
from ..pair.layers import visual_understanding_layers
from ..train.mix import read_sources
from .devices import Devices, device_sets
from .recipes import ADAPTER_STAGES, Recipe
from .runner import run_command, run_script
from .stages import Stage, plan, train_once
from .world import stage_settings
from .worldfile import CR, HALLUCINATION, MODELS, VQA, VQA_OF_TABLE_1, WorldFile

#: The scripts' and the trainer's own values: rows that say them aloud are not trained twice.
_DEFAULT_FLAGS = {
    "--attention_heads": "mean",
    "--attention_loss": "cosine",
    "--attention_rows": "all",
    "--attention_similarity": "row",
    "--layer_matching": "group",
    "--student_layers": "intermediate",
    "--teacher_layers": "intermediate",
}
#: Table 6: "small" and "large" are a student's two teachers. The usual one is the larger one of the small student and
#: the smaller one of the usual student.
_TEACHERS = {("default", "small"): "default", ("small", "large"): "default"}
#: Variables of the scripts that change nothing that is learned.
_NOT_LEARNED = {
    "BATCH", "DEEPSPEED_CONFIG", "GRADIENT_CHECKPOINTING", "LAUNCHER", "LAUNCHER_ARGS", "LOGGING_STEPS", "REPORT_TO",
    "SAVE_STEPS", "WORKERS",
}  # fmt: skip
_LLAVA_DATA = "See the section Train of LLaVA's README for the download."
_FIRST_PORT = 29_500


class FullSizeWorld:
    """See `llava_compodistill.reproduce.world.World`.

    Args:
        file: what the user has.
        root: folder of stages, runs and records.
    """

    name, title = "gpu", "full-size models"
    band = "intermediate"
    curve = 0  # an evaluation costs too much

    def __init__(self, file: WorldFile, root: Path):
        self.file, self.root = file, root
        chosen = set(file.benchmarks)
        self._averages = {"cr": CR, "vqa": VQA, "vqa5": VQA_OF_TABLE_1}
        titles = {"cr": "CR average", "vqa": "VQA average", "vqa5": "VQA average of 5"}
        self.metrics = {name: text for name, text in titles.items() if chosen >= set(self._averages[name])}
        # An average of some benchmarks is not the paper's, and is called by their names.
        for name, title in (("cr", "CR"), ("vqa", "VQA")):
            some = [benchmark for benchmark in self._averages[name] if benchmark in chosen]
            if name not in self.metrics and some:
                self._averages[name] = tuple(some)
                self.metrics[name] = f"{title}: {', '.join(some)}"
        self._compares = file.samples["cr"] is not None
        if self._compares:
            self.metrics["similarity"] = "similarity"
        self.more = {name: registered()[name].title for name in HALLUCINATION if name in chosen}

    # -----------------------------------------------------------------------------------------------------------------
    # What there is
    # -----------------------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        file = self.file
        variables = {name: value for name, value in file.environment.items() if name not in _NOT_LEARNED}
        return {
            "world": "full size",
            "tower": file.tower,
            "data": {name: file.data[name] for name in ("pretrain", "instruct", "eval")},
            "benchmarks": list(file.benchmarks),
            "samples": dict(file.samples),
            "lora": file.lora,
            "environment": variables,
            "flags": list(file.flags),
        }

    def models(self, recipe: Recipe) -> dict[str, Any]:
        found = {
            "student": self.file.students.get(recipe.student),
            "teacher": self.file.teachers.get(recipe.teacher),
            "template": self.file.template(recipe.student),
        }
        return found | ({"scaled": self.file.data["scaled"]} if recipe.mix == "scaled" else {})

    def normal(self, recipe: Recipe) -> Recipe:
        pairs = zip(recipe.flags[::2], recipe.flags[1::2], strict=True)
        flags = tuple(part for pair in pairs if _DEFAULT_FLAGS.get(pair[0]) != pair[1] for part in pair)
        teacher = _TEACHERS.get((recipe.student, recipe.teacher), recipe.teacher)
        if recipe.mix == "doubled":  # Table 5: half of it is the usual data, and all of it Table 9's mix
            recipe = replace(recipe, data=1.0, mix="" if recipe.data == 0.5 else "scaled")
        return replace(recipe, flags=flags, teacher=teacher)

    def refusal(self, recipe: Recipe) -> str | None:
        recipe = self.normal(recipe)
        lacking = []
        for kind, name in (("students", recipe.student), ("teachers", recipe.teacher)):
            if name not in getattr(self.file, kind):
                what = f" ({MODELS[kind, name]})" if (kind, name) in MODELS else ""
                lacking.append(f"{kind}.{name}{what}")
        if recipe.mix == "scaled" and self.file.data["scaled"] is None:
            lacking.append("data.scaled (Table 9: a YAML mix)")
        if lacking:
            return f"needs {' and '.join(lacking)} in {self.file.name}"
        if recipe.cache:
            return "needs a cache of the teacher, which is not made here (`llava-compodistill cache`)"
        whole = set(find_method(recipe.method).whole_stages) & set(recipe.stages)
        if self.file.lora and (whole or "--unfreeze_mm_vision_tower" in recipe.flags):
            return f"trains whole weights, which `lora: true` in {self.file.name} excludes"
        return None

    def refusal_of_figures(self) -> str | None:
        lacking = [f"samples.{kind}" for kind in ("vqa", "cr") if self.file.samples[kind] is None]
        if lacking:
            return f"needs {' and '.join(lacking)} (a benchmark or a file of answered questions) in {self.file.name}"
        return None

    @cached_property
    def devices(self) -> Devices:
        """The sets of GPUs."""
        return Devices(device_sets(self.file.device, self.file.gpus_per_run))

    @property
    def jobs(self) -> int:
        return len(self._sets())

    @property
    def ahead(self) -> int:
        return 3 * self.jobs

    def _sets(self) -> list[str]:
        """The sets of GPUs; one where there are none, which `prepare` refuses: a list or a report needs none."""
        try:
            return self.devices.sets
        except DataError:
            return [",".join("0" * (self.file.gpus_per_run or 1))]

    # -----------------------------------------------------------------------------------------------------------------
    # Before any work
    # -----------------------------------------------------------------------------------------------------------------
    def prepare(self, recipes: Iterable[Recipe] = ()) -> None:
        recipes = list(recipes)
        file, problems = self.file, []

        def check(look: Callable[[], Any], *entries: str, way_out: str = "") -> None:
            try:
                look()
            except (CompoDistillError, OSError, ValueError) as error:
                named = f" [{', '.join(entries)}]" if entries else ""
                problems.append(" ".join(filter(None, (f"{str(error).rstrip('.')}{named}.", way_out))))

        check(lambda: self.devices)
        if importlib.util.find_spec("llava") is None:
            problems.append("LLaVA cannot be imported: run this in a LLaVA checkout (`llava-compodistill init .`).")
        for name in sorted({"default", *(recipe.teacher for recipe in recipes)}):
            way_out = "teacher_pretrain.sh and teacher_finetune.sh train one."
            check(lambda name=name: check_checkpoint(file.teachers[name]), f"teachers.{name}", way_out=way_out)
        check(lambda: _find_model(file.tower), "tower")
        for name in sorted({recipe.student for recipe in recipes}):
            check(lambda name=name: _find_model(file.students[name]), f"students.{name}")
        if recipes:
            files = ["pretrain", "instruct", *(["scaled"] if any(r.mix == "scaled" for r in recipes) else [])]
            for entry in files:
                check(lambda entry=entry: self._find_files(entry), f"data.{entry}", way_out=_LLAVA_DATA)
            for entry in ("pretrain_images", "images"):
                check(lambda entry=entry: _find_folder(str(file.data[entry])), f"data.{entry}", way_out=_LLAVA_DATA)
        for name in file.benchmarks:
            check(lambda name=name: self._check_benchmark(name), "data.eval", "benchmarks")
        if self._compares:
            check(lambda: self.samples("cr"), "samples.cr", way_out="null leaves similarity out.")
        if not problems:
            for recipe in recipes:
                check(lambda recipe=recipe: self.plan(recipe, 0))
        if problems:
            head = f"not ready; entries in brackets are those of {file.name}:"
            raise DataError("\n  ".join((head, *dict.fromkeys(problems))))

    def _find_files(self, entry: str) -> None:
        for source in read_sources(str(self.file.data[entry])):
            if not os.path.isfile(source.path):
                raise DataError(f"there is no file {source.path}")

    def _check_benchmark(self, name: str) -> None:
        benchmark, data = get(name), Path(str(self.file.data["eval"]))
        if isinstance(benchmark, LlavaBenchmark):
            benchmark.check(data)
        elif isinstance(benchmark, EngineBenchmark):
            benchmark.load(data)

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------
    def plan(self, recipe: Recipe, seed: int) -> list[Stage]:
        """The stages of a run."""
        file = self.file
        processes = len(self._sets()[0].split(","))
        stages: list[Stage] = []
        for position, name in enumerate(recipe.stages):
            outputs = [stage.output for stage in stages]
            script, environment, flags = stage_settings(recipe, position, outputs, file.students[recipe.student])
            captions = name in ADAPTER_STAGES
            environment = {
                "TEACHER": file.teachers[recipe.teacher],
                "TOWER": file.tower,
                "DATA": str(file.data["pretrain"]) if captions else self._instructions(recipe),
                "IMAGES": str(file.data["pretrain_images" if captions else "images"]),
                "VERSION": file.template(recipe.student),
                "LORA": str(int(file.lora)),
                **environment,
                **({} if captions else _rate_and_length(recipe)),
                **file.environment,
            }
            seeds = ["--seed", str(seed), "--data_seed", str(seed)]
            more = [*recipe.flags] if name == "dft" else []
            flags = [*seeds, "--disable_tqdm", "True", *flags, *more, *file.flags]
            stages.append(plan(script, environment, flags, self.root / "stages", processes))
        return stages

    def _instructions(self, recipe: Recipe) -> str:
        """The instruction data of a recipe: one file, or a mix."""
        path = str(self.file.data["scaled" if recipe.mix == "scaled" else "instruct"])
        if recipe.data == 1:
            return path
        sources = [
            {"path": os.path.abspath(s.path), "weight": s.weight * recipe.data, "image_folder": s.image_folder}
            for s in read_sources(path)
        ]
        mix = self.root / "data" / f"{Path(path).stem}-{recipe.data:g}.yaml"
        mix.parent.mkdir(parents=True, exist_ok=True)
        mix.write_text(json.dumps({"datasets": sources}, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
        return str(mix)

    def steps(self, recipe: Recipe) -> int | None:
        try:
            steps = [stage.steps for stage in self.plan(self.normal(recipe), 0)]
        except DataError:  # a file that is not there, which `prepare` names
            return None
        return None if None in steps else sum(step for step in steps if step is not None)

    def train(
        self, recipe: Recipe, seed: int, folder: Path, threads: int, on_log: Callable[[], None]
    ) -> dict[str, Any]:
        stages = self.plan(recipe, seed)
        records = []
        for position, stage in enumerate(stages):
            # Of the lowest seed first, and of these what has come furthest: whole comparisons are done early.
            priority = (seed, -position)
            log = self.root / "logs" / f"{stage.output.name}.log"
            records.append(
                train_once(stage, folder.name, lambda s=stage, p=priority, log=log: self._call(s, p, log, on_log))
            )
        return {
            "checkpoint": str(stages[-1].output),
            # A stage that several runs share took its time for one of them.
            "seconds": round(sum(record["seconds"] for record in records if record["run"] == folder.name), 1),
            "steps": sum(record["steps"] for record in records),
            "stages": [{name: record[name] for name in ("key", "run", "seconds", "steps")} for record in records],
        }

    def _call(self, stage: Stage, priority: Any, log: Path, on_log: Callable[[], None]) -> float:
        with self.devices.borrow(priority) as (number, names):
            environment = {**stage.environment, **self._on(number, names), "OUTPUT": str(stage.output)}
            threads = max(1, (os.cpu_count() or 1) // (len(self.devices.sets) * len(names.split(","))))
            return run_script(stage.script, environment, stage.flags, log, threads, on_log)

    def _on(self, number: int, names: str) -> dict[str, str]:
        """What a process has to know of its devices. Trainings beside each other need ports of their own."""
        processes = len(names.split(","))
        found = {"CUDA_VISIBLE_DEVICES": names, "NPROC": str(processes)}
        if processes > 1 and "LAUNCHER_ARGS" not in self.file.environment:
            found["LAUNCHER_ARGS"] = f"--master_port {_FIRST_PORT + number}"
        return found

    def stop(self) -> None:
        self.devices.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------
    def evaluate(self, checkpoint: Path | None, teacher: str = "default") -> dict[str, Any]:
        teacher_path = self.file.teachers[teacher]
        model = str(checkpoint or teacher_path)
        output = checkpoint / "eval" if checkpoint else self.root / f"teacher-{teacher}" / "eval"
        flags = ["--model-path", model, "--data-root", str(self.file.data["eval"]), "--output", str(output)]
        flags += ["--benchmarks", ",".join(self.file.benchmarks)]
        if self.file.device == "cpu":
            flags += ["--device", "cpu"]
        values: dict[str, Any] = {}
        alike = None
        with self.devices.borrow((-1,)) as (number, names):  # before all training: it is short, and ends a run
            environment = {"CUDA_VISIBLE_DEVICES": names}
            if self.file.benchmarks:
                run_command(["eval", *flags], environment, output.with_name(f"{output.name}.log"))
            if self._compares and checkpoint:
                alike = self._similarity(teacher_path, checkpoint, environment)
        for name in self.file.benchmarks:
            values[name] = read_summary(output / f"{name}.json")["value"]
        found: dict[str, Any] = {"benchmarks": values}
        for metric, names in self._averages.items():
            if metric in self.metrics and all(values.get(name) is not None for name in names):
                found[metric] = mean(values[name] for name in names)
        found |= {name: values[name] for name in self.more}
        return found if alike is None else {**found, **alike}

    def _similarity(self, teacher: str, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Similarity to the teacher's attention over visual tokens: of the band's layers, and of each."""
        samples, output = self.file.samples, checkpoint / "similarity"
        flags = ["similarity", teacher, str(checkpoint), "--data", samples["cr"], "--images", samples["images"] or ""]
        flags += ["--data-root", str(self.file.data["eval"]), "--output", str(output), "--band", self.band]
        flags += ["--limit", str(samples["limit"] or 0)]
        if self.file.device == "cpu":
            flags += ["--device", "cpu"]
        run_command(["analyze", *flags], environment, output.with_suffix(".log"))
        found = read_object(output / "similarity.json")["found"]
        layers = next([layer["value"] for layer in curve["layers"]] for curve in found if curve["keys"] == "visual")
        band = visual_understanding_layers(len(layers), self.band)
        return {"similarity": mean(layers[layer] for layer in band), "similarity_by_layer": layers}

    def load(self, checkpoint: Path | None) -> Any:
        from ..eval.loading import load_engine

        path = str(checkpoint or self.file.teachers["default"])
        return load_engine(path, template_of(path), device=self.file.device)

    def samples(self, kind: str) -> list[Any]:
        from ..analysis.samples import read_samples, thinned

        samples = self.file.samples
        source = samples[kind]
        if source is None:
            raise DataError(f"samples.{kind} in {self.file.name} is empty.")
        found = read_samples(str(source), samples["images"] or "", Path(str(self.file.data["eval"])))
        return thinned(found, samples["limit"] or 0)


def _find_model(model: str) -> None:
    """A name on the hub passes, as the scripts tell one from a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+", model):
        _find_folder(model)


def _find_folder(path: str) -> None:
    if not Path(path).is_dir():
        raise DataError(f"there is no folder {path}")


def _rate_and_length(recipe: Recipe) -> dict[str, str]:
    """What a recipe changes in the stages that train the language model."""
    changed = {} if recipe.rate is None else {"LR": str(recipe.rate)}
    return changed if recipe.steps == 1 else {**changed, "EPOCHS": f"{recipe.steps:g}"}
