"""The miniature as a world for `llava-compodistill reproduce`: the paper's recipes on coloured shapes.

Every student gets the same number of optimizer steps, whatever its stages: 60 of the one that trains the adapter,
1,200 of the one that does the work (DFT where there is one), and 140 of another at a lower rate; a recipe without
another gives these to the one that does the work. Recognition stands in for VQA, the compositional types for CR; the
relation types (swap_obj, replace_rel) are those that the set of objects does not give away.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_compodistill.reproduce.recipes import ADAPTER_STAGES, Recipe
from llava_compodistill.reproduce.world import stage_settings

from . import weights
from .caches import cache_once
from .dataset import EXTRA_ROUNDS, write_more
from .quickstart import _write_data, recipe
from .settings import VERSION, Settings, preset
from .stages import common_environment, common_flags, run_script, train_teacher


class MiniatureWorld:
    """See `llava_compodistill.reproduce.world.World`.

    Args:
        name: cpu (the quick start's settings) or smoke (a few steps, to see that all of it runs).
        root: folder of data and models.
        split: held-out split of the figures.
    """

    metrics = {
        "cr": "compositional",
        "relations": "relation types",
        "vqa": "recognition",
        "similarity": "similarity",
    }
    more = {"relation_questions": "relation questions"}
    jobs, ahead, curve = None, 0, 0

    def __init__(self, name: str, root: Path, split: str = "test"):
        self.name, self.root, self.split = name, root, split
        self.title = "the miniature world" + (", a few steps a student" if name == "smoke" else "")
        self.preset: Settings = preset("smoke" if name == "smoke" else "default")
        self.band = self.preset.band
        self._evaluating = threading.Lock()  # one at a time: each takes all cores
        self._teachers: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        return {"world": f"miniature, {self.name}", "split": self.split, **recipe(self.preset)}

    def normal(self, recipe: Recipe) -> Recipe:
        band = ("--student_layers", self.preset.band, "--teacher_layers", self.preset.band)
        flags = recipe.flags[4:] if recipe.flags[:4] == band else recipe.flags
        if "--layer_matching" in flags and recipe.student == "default":
            # Bands of equally many layers leave nothing to match: a shallower student, and all layers.
            flags = ("--student_layers", "all", "--teacher_layers", "all", *flags)
            recipe = replace(recipe, student="shallow")
        if recipe.mix == "doubled":  # all that the other tables train on; Table 5 halves it
            recipe = replace(recipe, mix="")
        # Table 6: the smaller teacher was made for it.
        teacher = "default" if recipe.teacher == "large" else recipe.teacher
        return replace(recipe, flags=flags, teacher=teacher)

    def models(self, recipe: Recipe) -> dict[str, Any]:
        return {}  # made from the settings

    def steps(self, recipe: Recipe) -> int | None:
        return sum(self.steps_and_rate(recipe, position)[0] for position in range(len(recipe.stages)))

    def refusal(self, recipe: Recipe) -> str | None:
        if not weights.have_stored_weights():
            return "needs the stored weights, which are not in this checkout"
        return None

    def refusal_of_figures(self) -> str | None:
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # Data and models
    # -----------------------------------------------------------------------------------------------------------------
    def prepare(self, recipes: Iterable[Recipe] = ()) -> None:
        recipes = list(recipes)
        if not (self.root / "data" / "manifest.json").is_file():
            manifest = _write_data(self.preset, self.root, stored=all(r.teacher == "default" for r in recipes))
            (self.root / "data" / "manifest.json").write_text(json.dumps(manifest, default=str) + "\n")
        self._write_missing_data(recipes)
        models = self.root / "models"
        if not (models / "llava-teacher" / "config.json").is_file():
            weights.install(models)
        for name in sorted({r.student for r in recipes}):
            self._make_student(name)
        for name in sorted({r.teacher for r in recipes}):
            self._make_teacher(name)

    def _write_missing_data(self, recipes: list[Recipe]) -> None:
        """What some recipes alone read, and a folder made for others may lack."""
        data, world, workers = self.root / "data", self.preset.world, os.cpu_count() or 1
        if any(r.mix == "scaled" for r in recipes) and not (data / "instruct_extra.json").is_file():
            write_more(data, "instruct_extra", world.instruct_student, EXTRA_ROUNDS, workers)
        if all((self.teacher(r.teacher) / "config.json").is_file() for r in recipes if r.teacher != "default"):
            return
        if (data / "instruct_teacher.json").read_text(encoding="utf-8").strip() == "[]":
            write_more(data, "instruct_teacher", world.instruct_teacher, workers=workers)

    def student(self, name: str) -> Path:
        return self.root / "models" / ("qwen-student" if name == "default" else f"{name}-student")

    def teacher(self, name: str) -> Path:
        return self.root / "models" / ("llava-teacher" if name == "default" else f"llava-{name}-teacher")

    def _make_student(self, name: str) -> None:
        from .language_models import build_language_model

        if (self.student(name) / "config.json").is_file():
            return
        student = self.preset.student
        specs = {
            "shallow": replace(student, num_hidden_layers=4),
            "small": replace(student, hidden_size=48, intermediate_size=144),
            "llama": student,
        }
        build_language_model(
            self.student(name), self.root / "models" / "tokenizer", specs[name], self.preset.student_text,
            family="llama" if name == "llama" else "qwen2", progress=False,
        )  # fmt: skip

    def _make_teacher(self, name: str) -> None:
        """A teacher that is not stored, trained as the stored one was: some 20 minutes on a core."""
        from .language_models import build_language_model

        if (self.teacher(name) / "config.json").is_file():
            return
        teacher = self.preset.teacher
        small = replace(teacher, hidden_size=72, intermediate_size=192)
        specs = {"small": small, "llama": teacher, "second": teacher}
        seed = 1 if name == "second" else 0  # of everything that is random in a teacher
        base = self.root / "models" / f"{name}-teacher"
        build_language_model(
            base, self.root / "models" / "tokenizer", specs[name], replace(self.preset.teacher_text, seed=seed),
            family="llama" if name == "llama" else "qwen2", progress=False,
        )  # fmt: skip
        train_teacher(self.preset, self.root, 1, llm=base, output=self.teacher(name), seed=seed)

    def _instructions(self, share: float, mix: str = "") -> Path:
        """The students' conversations, a share of them, or these and `instruct_extra.json`."""
        whole = self.root / "data" / "instruct_student.json"
        if mix == "scaled":
            path = whole.with_name("instruct_scaled.yaml")
            path.write_text(f"datasets:\n  - path: {whole.name}\n  - path: instruct_extra.json\n", encoding="utf-8")
            return path
        if share == 1:
            return whole
        path = whole.with_name(f"instruct_student_{share:g}.yaml")
        path.write_text(f"datasets:\n  - path: {whole.name}\n    weight: {share:g}\n", encoding="utf-8")
        return path

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------
    def steps_and_rate(self, recipe: Recipe, position: int) -> tuple[int, float]:
        """Optimizer steps and learning rate of a recipe's stage."""
        settings = self.preset
        if position == 0:
            return settings.pretrain_steps, settings.pretrain_learning_rate
        aligned = recipe.vat and recipe.distils
        rate = settings.aligned_learning_rate if aligned else settings.learning_rate
        last = settings.supervised_learning_rate
        if recipe.rate is not None:  # for both stages
            rate, last = recipe.rate, last * (recipe.rate / rate)
        distil, supervised = (
            round(steps * recipe.steps) for steps in (settings.distil_steps, settings.supervised_steps)
        )
        later = recipe.stages[1:]
        if len(later) == 1:
            return distil + supervised, rate
        main = "dft" if "dft" in later else later[0]
        return (distil, rate) if recipe.stages[position] == main else (supervised, last)

    def train(
        self, recipe: Recipe, seed: int, folder: Path, threads: int, on_log: Callable[[], None]
    ) -> dict[str, Any]:
        settings, models = self.preset, self.root / "models"
        outputs: list[Path] = []
        curve: list[list[float]] = []
        caches: list[dict[str, Any]] = []
        seconds, total = 0.0, 0
        main = max(range(1, len(recipe.stages)), key=lambda position: self.steps_and_rate(recipe, position)[0])
        for position, stage in enumerate(recipe.stages):
            steps, rate = self.steps_and_rate(recipe, position)
            last = position == len(recipe.stages) - 1
            output = folder / ("llava-student" if last else f"{position}-{stage}")
            shutil.rmtree(output, ignore_errors=True)  # a result there would be recognised as finished
            script, environment, flags = stage_settings(recipe, position, outputs, str(self.student(recipe.student)))
            captions = stage in ADAPTER_STAGES
            environment = {
                **common_environment(settings),
                "TEACHER": self.teacher(recipe.teacher),
                "TOWER": models / "siglip",
                "DATA": self.root / "data" / "pretrain.json"
                if captions
                else self._instructions(recipe.data, recipe.mix),
                "IMAGES": self.root / "data" / "images",
                "OUTPUT": output,
                "LR": rate,
                **environment,
            }
            flags = [*common_flags(settings, seed), "--max_steps", str(steps), *flags]
            weight = recipe.weight or 1.0
            flags += ["--kl_weight", str(settings.kl_weight * (1.0 if recipe.vat else weight))]
            if stage == "dft":
                flags += ["--attention_weight", str(settings.attention_weight * (weight if recipe.vat else 1.0))]
                flags += ["--student_layers", settings.band, "--teacher_layers", settings.band, *recipe.flags]
            if self.curve and position == main:
                flags += ["--save_strategy", "steps", "--save_steps", str(max(1, steps // self.curve))]
                flags += ["--save_total_limit", str(self.curve + 1)]
            if recipe.cache and stage not in ("pt", "sft"):
                made = cache_once(self.root / "caches", recipe.cache, script, environment, flags, threads)
                flags += ["--teacher_cache", str(made["folder"])]
                caches.append({"stage": stage, **made})
            seconds += run_script(script, environment, flags, folder / f"{position}-{stage}.log", threads, on_log)
            if self.curve and position == main:
                curve = self._curve(output, total)
            outputs.append(output)
            total += steps
        found = {"checkpoint": str(outputs[-1]), "seconds": round(seconds, 1), "steps": total}
        if caches:  # made once for all students: not among their seconds
            found["caches"] = caches
        if self.curve:
            curve += self._curve(outputs[-1], total) if main < len(outputs) - 1 else []
            found["curve"] = curve
        return found

    def _curve(self, output: Path, before: int) -> list[list[float]]:
        """[steps, relation types in %] of a stage's checkpoints, which are deleted, or of its result without any."""
        from .evaluate import load_for_evaluation, relation_types

        checkpoints = {int(path.name.split("-")[1]): path for path in output.glob("checkpoint-*")}
        found = []
        for step, path in sorted(checkpoints.items()) or [(0, output)]:
            with self._evaluating:
                model, tokenizer = load_for_evaluation(path)
                found.append([before + step, 100 * relation_types(model, tokenizer, self.root / "data", "val")])
            if path != output:
                shutil.rmtree(path)
        return found

    def stop(self) -> None:
        pass  # a run that has begun ends in minutes

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------
    def load(self, checkpoint: Path | None) -> Any:
        from llava_compodistill.eval.loading import load_engine

        return load_engine(str(checkpoint or self.teacher("default")), VERSION)

    def samples(self, kind: str) -> list[Any]:
        from llava_compodistill.analysis.samples import Sample, read_samples, thinned

        from .language import CAPTION_PROMPT

        data = self.root / "data"
        if kind == "vqa":
            found = read_samples(str(data / f"recognition_{self.split}.jsonl"), str(data / "images"))
        else:
            found = [
                Sample(
                    str(data / "images" / item["filename"]), CAPTION_PROMPT, item["caption"],
                    (item["negative_caption"],), path.stem,
                )
                for path in sorted((data / f"compositional_{self.split}").glob("*.json"))
                for item in json.loads(path.read_text(encoding="utf-8")).values()
            ]  # fmt: skip
        return thinned(found, self.preset.similarity_captions)

    def evaluate(self, checkpoint: Path | None, teacher: str = "default") -> dict[str, Any]:
        from llava_compodistill.analysis.similarity import similarity

        from .evaluate import evaluate, load_for_evaluation, read_captions

        with self._evaluating:
            if teacher not in self._teachers:
                self._teachers[teacher] = load_for_evaluation(self.teacher(teacher))[0]
            model, tokenizer = load_for_evaluation(checkpoint or self.teacher(teacher))
            scores = evaluate(model, tokenizer, self.root / "data", self.split).as_dict()
            captions = read_captions(self.root / "data", self.split)
            captions = captions[:: max(1, len(captions) // self.preset.similarity_captions)]
            alike = similarity(
                model, self._teachers[teacher], captions, tokenizer, version=VERSION, band=self.preset.band
            )
        return {
            "cr": 100 * scores["compositional_mean"],
            "relations": 100 * scores["relation_types"],
            "vqa": 100 * scores["recognition"],
            "similarity": alike.band,
            "similarity_by_layer": alike.by_layer,
            "types": {kind: 100 * value for kind, value in scores["compositional"].items()},
            "relation_questions": 100 * scores["relation"],
            "unseen": 100 * scores["unseen_mean"],
        }
