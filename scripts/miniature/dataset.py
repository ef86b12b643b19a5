"""Writes the miniature world to a folder in the formats of a real LLaVA user. See :func:`write_dataset`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .compositional import KINDS, caption_pair, scene_for
from .language import (
    CAPTION_PROMPT,
    CHOICE_PROMPT,
    HORIZONTAL,
    MATCH_PROMPT,
    OPPOSITE,
    RELATIONS,
    Caption,
    Mention,
    Round,
    ask,
    relation_question,
    text_round,
    true_caption,
    vocabulary,
)
from .world import HELD_OUT, IMAGE_SIZE, SEEN, Scene, SceneObject, pick, pick_pairs, render_array, sample_scene

FORMAT_VERSION = 1
SPLITS = ("val", "test")
RECOGNITION_KINDS = ("color", "shape", "size", "count")

#: Ten rounds an image. A detailed description has many answer tokens and none of them by chance, where most other
#: answers are a single token.
DEFAULT_ROUNDS = {
    "caption": 2.0,
    "detail": 1.8,
    "color": 0.5,
    "shape": 0.3,
    "count": 0.2,
    "size": 0.5,
    "side": 1.2,
    "horizontal": 0.7,
    "vertical": 0.7,
    "row": 0.9,
    "column": 0.9,
    "match": 0.2,
    "choice": 0.1,
}

#: Another source of data (the paper's Table 9): long captions and questions on single objects, also ten rounds.
EXTRA_ROUNDS = {"detail": 3.0, "color": 1.0, "shape": 1.0, "count": 1.0, "row": 2.0, "column": 2.0}


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the miniature world. Image counts are images; compositional counts are items per type (even)."""

    seed: int = 0
    pretrain: int = 3_000
    instruct_teacher: int = 20_000
    instruct_student: int = 4_000
    recognition: int = 400
    relation: int = 400
    compositional: int = 200
    compositional_unseen: int = 100
    text_only_rate: float = 0.03
    """Text-only records as a share of an instruction file."""
    rounds: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_ROUNDS))
    """Mean number of rounds of each kind per image; the fractional part is a probability."""
    records_per_image: int = 10
    """Over how many records an image's rounds are spread; with 10, nearly every record has one round.

    With 1, later rounds read earlier questions and answers as text, and small models learn to look there instead of at
    the image (suspected; not compared at equal compute).
    """

    def __post_init__(self) -> None:
        for name in ("compositional", "compositional_unseen", "relation"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} must be even (items come in mirrored couples), got {getattr(self, name)}")
        if not 0 <= self.text_only_rate < 1:
            raise ValueError(f"text_only_rate must be in [0, 1), got {self.text_only_rate}")
        if self.records_per_image < 1:
            raise ValueError(f"records_per_image must be at least 1, got {self.records_per_image}")

    @classmethod
    def preset(cls, name: str, **changes) -> WorldConfig:
        """``default`` (two CPU cores), ``smoke`` (seconds, for tests) or ``gpu`` (five times the data)."""
        presets = {
            "default": cls(),
            "smoke": cls(
                pretrain=64,
                instruct_teacher=160,
                instruct_student=64,
                recognition=16,
                relation=16,
                compositional=4,
                compositional_unseen=4,
            ),
            "gpu": cls(
                pretrain=20_000,
                instruct_teacher=100_000,
                instruct_student=20_000,
                recognition=1_000,
                relation=1_000,
                compositional=400,
                compositional_unseen=200,
            ),
        }
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}; known: {tuple(presets)}")
        return replace(presets[name], **changes)


class _Scenes:
    """Draws scenes that have not been drawn before, in any split, and remembers the images to render."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.images: dict[str, list[tuple[str, Scene]]] = {}

    def add(self, stream: str, draw: Callable[[], Scene], max_tries: int = 10_000) -> tuple[str, Scene]:
        """The image path (below ``images/``) and scene of the first new draw."""
        for _ in range(max_tries):
            scene = draw()
            if scene.key not in self.keys:
                self.keys.add(scene.key)
                images = self.images.setdefault(stream, [])
                images.append((f"{stream}/{len(images):06d}.png", scene))
                return images[-1]
        raise RuntimeError(f"no unused scene found for {stream!r} in {max_tries} draws: ask for fewer images")


def _turns(rounds: Sequence[Round], with_image: bool) -> list[dict[str, str]]:
    """LLaVA's conversation list; the image token opens the first question."""
    turns = []
    for i, (question, answer) in enumerate(rounds):
        prefix = "<image>\n" if with_image and i == 0 else ""
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns


def instruction_rounds(scene: Scene, means: dict[str, float], rng: np.random.Generator) -> list[Round]:
    """The rounds about one image, shuffled; `means` gives the mean number of each kind."""
    rounds = []
    for kind, mean in means.items():
        number = int(mean) + (rng.random() < mean - int(mean))
        rounds += [ask(kind, scene, rng) for _ in range(number)]
    return [rounds[int(i)] for i in rng.permutation(len(rounds))]


def _pretrain(config: WorldConfig, scenes: _Scenes, rng: np.random.Generator) -> list[dict]:
    records = []
    for i in range(config.pretrain):
        image, scene = scenes.add("pretrain", lambda: sample_scene(rng))
        turns = _turns([(CAPTION_PROMPT, str(true_caption(scene, rng)))], with_image=True)
        records.append({"id": f"pretrain_{i:06d}", "image": image, "conversations": turns})
    return records


def _records(name: str, image: str, rounds: list[Round], config: WorldConfig) -> list[dict]:
    """An image's rounds spread over `records_per_image` records."""
    parts = [rounds[part :: config.records_per_image] for part in range(min(config.records_per_image, len(rounds)))]
    return [
        {"id": f"{name}_{part}", "image": image, "conversations": _turns(share, with_image=True)}
        for part, share in enumerate(parts)
    ]


def _instruct(name: str, number: int, config: WorldConfig, scenes: _Scenes, rng: np.random.Generator) -> list[dict]:
    records: list[dict] = []
    for i in range(number):
        image, scene = scenes.add(name, lambda: sample_scene(rng))
        records += _records(f"{name}_{i:06d}", image, instruction_rounds(scene, config.rounds, rng), config)
    text_only = round(len(records) * config.text_only_rate / (1 - config.text_only_rate))
    for i in range(text_only):
        rounds = [text_round(rng) for _ in range(3)]
        records.append({"id": f"{name}_text_{i:06d}", "conversations": _turns(rounds, with_image=False)})
    return [records[int(i)] for i in rng.permutation(len(records))]


def _recognition(stream: str, config: WorldConfig, scenes: _Scenes, rng: np.random.Generator) -> list[dict]:
    """One question of each kind per image, where the scene allows it; ``type`` names the kind."""
    records: list[dict] = []
    for _ in range(config.recognition):
        image, scene = scenes.add(stream, lambda: sample_scene(rng))
        for kind in RECOGNITION_KINDS:
            question, answer = ask(kind, scene, rng)
            if kind != "size" and question.startswith("What size"):
                continue  # the fallback of a scene without a unique shape or colour: size is asked below anyway
            records.append(_question(f"{stream}_{len(records):06d}", image, question, answer, kind))
    return records


def _relation(stream: str, config: WorldConfig, scenes: _Scenes, rng: np.random.Generator) -> list[dict]:
    """Every question twice, over an image where the answer is yes and over one where it is no."""
    records: list[dict] = []
    for _ in range(config.relation // 2):
        a, b = (Mention(*p) for p in pick_pairs(rng, SEEN, 2))
        relation = pick(rng, tuple(RELATIONS))
        yes, no = Caption((a, b), relation), Caption((a, b), OPPOSITE[relation])
        question = relation_question(a.pair, relation, b.pair)
        for answer, true, false in (("Yes", yes, no), ("No", no, yes)):
            image, _ = scenes.add(stream, lambda true=true, false=false: scene_for(true, false, rng))
            kind = "horizontal" if relation in HORIZONTAL else "vertical"
            records.append(_question(f"{stream}_{len(records):06d}", image, question, answer, kind))
    return records


def _question(question_id: str, image: str, text: str, answer: str, kind: str) -> dict:
    return {"question_id": question_id, "image": image, "text": text, "answer": answer, "type": kind}


def _compositional(
    stream: str, items: int, scenes: _Scenes, rng: np.random.Generator, unseen: bool
) -> dict[str, dict[str, dict[str, str]]]:
    """SugarCrepe's dict per type; items 2k and 2k+1 hold the same two captions with the roles exchanged."""
    subsets: dict[str, dict[str, dict[str, str]]] = {}
    for kind in KINDS:
        subset: dict[str, dict[str, str]] = {}
        number = count()
        for _ in range(items // 2):
            first, second = caption_pair(kind, rng, unseen)
            for true, false in ((first, second), (second, first)):
                image, _ = scenes.add(stream, lambda true=true, false=false: scene_for(true, false, rng))
                item = {"filename": image, "caption": str(true), "negative_caption": str(false)}
                subset[str(next(number))] = item
        subsets[kind] = subset
    return subsets


def _render_batch(job: tuple[str, list[tuple[str, Scene, list[int]]]]) -> int:
    folder, images = job
    for path, scene, seed in images:
        pixels = render_array(scene, np.random.default_rng(seed))
        Image.fromarray(pixels).save(Path(folder) / path, compress_level=1)
    return len(images)


def _render_jobs(out: Path, scenes: _Scenes, seed: int, size: int = 500) -> Iterator[tuple[str, list]]:
    """Batches of images; each image has its own pixel seed, so the batching does not change a pixel."""
    for index, (stream, images) in enumerate(sorted(scenes.images.items())):
        (out / "images" / stream).mkdir(parents=True, exist_ok=True)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            jobs = [(path, scene, [seed, 1_000 + index, start + i]) for i, (path, scene) in enumerate(batch)]
            yield str(out / "images"), jobs


def _write_json(path: Path, data: object, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=indent), encoding="utf-8")


def _write_jsonl(path: Path, records: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def write_dataset(out: str | Path, config: WorldConfig | None = None, workers: int = 1, progress: bool = True) -> dict:
    """Generate the world below ``out`` and return the manifest. Same config, same bytes.

    ==============================================  ==================================================================
    ``pretrain.json``                               LLaVA pre-training: one caption per image, shared by all models
    ``instruct_teacher.json``, ``…_student.json``   LLaVA instruction records, several rounds each, some text-only
    ``recognition_{val,test}.jsonl``                question_id, image, text, answer, type (color/shape/size/count)
    ``relation_{val,test}.jsonl``                   the same keys; yes/no, type horizontal/vertical
    ``compositional_{val,test}[_unseen]/*.json``    SugarCrepe: {"0": {filename, caption, negative_caption}, …}
    ``scenes/*.jsonl``                              what is in each image, for analyses and overlays
    ``images/…``                                    PNG files; every image path above is relative to this folder
    ``manifest.json``                               config, counts, vocabulary
    ==============================================  ==================================================================

    No scene occurs twice in the whole folder. Held-out colour-shape pairs occur in ``*_unseen`` sets only.
    A folder that was completed with the same config is left as it is; one with another config is an error.
    """
    config = config or WorldConfig()
    out = Path(out)
    if (done := out / "manifest.json").is_file():
        manifest = json.loads(done.read_text(encoding="utf-8"))
        if (manifest["format_version"], manifest["config"]) == (FORMAT_VERSION, asdict(config)):
            return manifest
        raise FileExistsError(f"{out} holds a world made with another config: choose another folder or delete it")
    scenes = _Scenes()
    counts: dict[str, int] = {}

    def stream_rng(index: int) -> np.random.Generator:
        # One independent stream per file, so that changing one size leaves the other files' draws alone.
        return np.random.default_rng([config.seed, index])

    # Test sets first: they get the scenes they want and training takes what is left, never the other way round.
    for s, split in enumerate(reversed(SPLITS)):
        for i, (name, make) in enumerate((("recognition", _recognition), ("relation", _relation))):
            records = make(f"{name}_{split}", config, scenes, stream_rng(10 * s + i))
            _write_jsonl(out / f"{name}_{split}.jsonl", records)
            counts[f"{name}_{split}"] = len(records)
        for i, (suffix, items) in enumerate((("", config.compositional), ("_unseen", config.compositional_unseen))):
            name = f"compositional_{split}{suffix}"
            subsets = _compositional(name, items, scenes, stream_rng(10 * s + 5 + i), unseen=bool(suffix))
            for kind, subset in subsets.items():
                _write_json(out / name / f"{kind}.json", subset, indent=1)
                counts[f"{name}/{kind}"] = len(subset)

    for i, name in enumerate(("instruct_student", "instruct_teacher")):
        records = _instruct(name, getattr(config, name), config, scenes, stream_rng(100 + i))
        _write_json(out / f"{name}.json", records)
        counts[name] = len(records)
    records = _pretrain(config, scenes, stream_rng(102))
    _write_json(out / "pretrain.json", records)
    counts["pretrain"] = len(records)

    for stream, images in scenes.images.items():
        _write_jsonl(out / "scenes" / f"{stream}.jsonl", [{"image": p, "objects": s.to_list()} for p, s in images])

    jobs = list(_render_jobs(out, scenes, config.seed))
    total = sum(len(images) for images in scenes.images.values())
    with tqdm(total=total, desc="rendering", unit="img", disable=not progress) as bar:
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                for done in pool.map(_render_batch, jobs):
                    bar.update(done)
        else:
            for job in jobs:
                bar.update(_render_batch(job))

    manifest = {
        "format_version": FORMAT_VERSION,
        "config": asdict(config),
        "counts": counts,
        "images": {stream: len(images) for stream, images in scenes.images.items()},
        "image_size": IMAGE_SIZE,
        "held_out_pairs": [list(p) for p in HELD_OUT],
        "prompts": {"caption": CAPTION_PROMPT, "choice": CHOICE_PROMPT, "match": MATCH_PROMPT},
        "vocabulary": vocabulary(),
    }
    _write_json(out / "manifest.json", manifest, indent=1)
    return manifest


def write_more(
    out: str | Path, name: str, images: int, rounds: dict[str, float] | None = None, workers: int = 1
) -> Path:
    """Write another instruction file NAME.json into a folder that `write_dataset` filled, and return its path.

    Args:
        images: how many new images it has; no scene of the folder occurs again.
        rounds: mean number of rounds of each kind per image (default: those of the folder).
    """
    out = Path(out)
    config = WorldConfig(**json.loads((out / "manifest.json").read_text(encoding="utf-8"))["config"])
    config = replace(config, rounds=rounds or config.rounds)
    scenes = _Scenes()
    for file in sorted((out / "scenes").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            objects = tuple(SceneObject(**thing) for thing in json.loads(line)["objects"])
            scenes.keys.add(Scene(objects).key)
    own = list(name.encode())  # a stream of its own for each name
    records = _instruct(name, images, config, scenes, np.random.default_rng([config.seed, 103, *own]))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_render_batch, _render_jobs(out, scenes, config.seed + 1)))
    for stream, drawn in scenes.images.items():
        lines = [{"image": path, "objects": scene.to_list()} for path, scene in drawn]
        _write_jsonl(out / "scenes" / f"{stream}.jsonl", lines)
    _write_json(out / f"{name}.json", records)
    return out / f"{name}.json"
