"""What is fuzzed: a file of each kind, the reader that the product has for it, and what must hold of all it accepts.

Each function takes a folder of its own, changes one file in there, and returns (what was done, the names of which an
error has to give one, a function that reads). That raises `Nonsense` where something was accepted that cannot be.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutations
from world import World

#: The file that hostile content would leave.
MARKER = "payload-ran"
Prepared = tuple[str, list[str], Callable[[], None]]
_SAMPLES = 6
_TEXT = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A color"}]


class Nonsense(Exception):
    """Something was accepted that has no meaning."""


def insist(holds: bool, what: str) -> None:
    if not holds:
        raise Nonsense(what)


_shared = SimpleNamespace(tokenizer=None, processor=None)


def prepare(world: World) -> None:
    """Tokenizer, template and image processor, read once."""
    import transformers

    from llava_compodistill.hosts.llava import register
    from llava_compodistill.hosts.llava.loader import read_tokenizer
    from llava_compodistill.hosts.llava.templates import prepare_tokenizer, use_template

    register(train=True)
    _shared.tokenizer = read_tokenizer(str(world.root / "models" / "tokenizer"), model_max_length=512)
    prepare_tokenizer(_shared.tokenizer, use_template("qwen_qa"))
    processor = transformers.SiglipImageProcessor.from_pretrained(str(world.root / "models" / "siglip"))
    processor.crop_size = dict(processor.size)  # as the plugin's tower has it: LLaVA asks for the size of no image
    _shared.processor = processor


def write(path: Path, data: bytes, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.replace(b"MARKER", str(folder / MARKER).encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Training data
# ---------------------------------------------------------------------------------------------------------------------
def data(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A JSON file of samples."""
    records = json.loads(world.data("dft").read_text(encoding="utf-8"))[:_SAMPLES]
    content, words = mutations.of_file(json.dumps(records).encode(), "samples.json", rng)
    write(folder / "samples.json", content, folder)
    return words, ["samples.json"], lambda: _read_data(folder / "samples.json", world.images, rng)


def mix(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A YAML mix of two files."""
    for name in ("one", "two"):
        shutil.copy(world.data("dft"), folder / f"{name}.json")
    text = b"datasets:\n  - path: one.json\n    weight: 0.5\n  - path: two.json\n    image_folder: ''\n"
    content, words = mutations.of_file(text, "mix.yaml", rng)
    write(folder / "mix.yaml", content, folder)
    # An entry may name another file now, which is as good a name.
    return words, ["--data_path", "one.json", "two.json"], lambda: _read_data(folder / "mix.yaml", world.images, rng)


def image(world: World, folder: Path, rng: random.Random) -> Prepared:
    """An image of the training data, or of an evaluation."""
    content, words = mutations.image(rng)
    name = rng.choice(("picture.png", "picture.jpg", "picture"))
    write(folder / name, content, folder)
    if rng.random() < 0.4:
        return words, [name], lambda: _read_for_eval(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red"}]
    samples = [{"id": "1", "image": name, "conversations": turns}, {"id": "2", "conversations": _TEXT}]
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return words, [name], lambda: _read_data(folder / "samples.json", folder, rng)


def _read_data(path: Path, images: Path, rng: random.Random) -> None:
    from llava_compodistill.train.data import CheckedDataset

    arguments = SimpleNamespace(
        image_folder=str(images),
        bad_samples=rng.choice(("error", "skip")),
        check_images=rng.random() < 0.8,
        image_processor=_shared.processor,
        image_aspect_ratio=rng.choice(("pad", "square")),
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    found = CheckedDataset(str(path), _shared.tokenizer, arguments)
    insist(len(found) > 0, "no samples")
    for number in range(min(len(found), 2 * _SAMPLES)):
        sample = found[number]
        ids, labels = sample["input_ids"], sample["labels"]
        insist(ids.ndim == 1 and ids.shape == labels.shape and len(ids) > 0, "shapes of ids and labels")
        insist(bool((labels != -100).any()), f"sample {number} has no answer")
        insist(int(ids.max()) < len(_shared.tokenizer), f"sample {number} has unknown tokens")
        places = int((ids == -200).sum())
        insist(bool(sample["image"].isfinite().all()), f"sample {number} has pixels that are no numbers")
        insist(sample["image"].ndim == 3 and sample["image"].shape[0] == 3, f"sample {number}: shape of the image")
        if arguments.bad_samples == "error":  # else another sample may have taken this one's place
            with_image = "image" in found.list_data_dict[number]
            insist(places == int(with_image), f"sample {number} has {places} places for an image")


def _read_for_eval(path: Path) -> None:
    from llava_compodistill.eval.marks import Boxes
    from llava_compodistill.eval.pictures import MakePixels, Unreadable
    from llava_compodistill.hosts.llava import import_llava

    process = import_llava("llava.mm_utils").process_images
    import torch

    config = SimpleNamespace(image_aspect_ratio="pad")
    make = MakePixels(process, _shared.processor, config, torch.float32)
    for picture in (str(path), Boxes(str(path), ((0.1, 0.1, 0.6, 0.5), (0.2, 0.2, 0.9, 0.9)), ("red", "green"))):
        made = make(picture)
        if isinstance(made, Unreadable):
            raise made
        insist(bool(made.values.isfinite().all()), "pixels that are no numbers")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks, answers, records
# ---------------------------------------------------------------------------------------------------------------------
_HOMES = {"mme": "MME", "rbench-box": "rbench", "rbench-mask": "rbench"}


def benchmark(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A file of questions or labels, of any benchmark."""
    from llava_compodistill.eval.benchmarks import registered
    from llava_compodistill.eval.benchmarks.base import EngineBenchmark

    chosen = rng.choice(list(registered().values()))
    path, words = _changed_home(world, chosen.name, folder, rng)

    def read() -> None:
        if not isinstance(chosen, EngineBenchmark):
            chosen.check(folder)
            return _score_answers(chosen, folder, _answers(folder, chosen, folder / "answers.jsonl", rng))
        items = chosen.load(folder)
        insist(bool(items), "no items")
        insist(len({item.id for item in items}) == len(items), "an id stands twice")
        for item in items:
            texts = [*item.captions, item.prompt] if item.prompt else item.captions
            insist(bool(item.images) and bool(texts), "an item without image or text")
            insist(all(isinstance(text, str) and text.strip() for text in texts), "a text that is none")
            insist(all(Path(image).is_file() for image in item.images), "an image that is not there")
        return None

    return f"{path.relative_to(folder)}: {words}", [path.name, chosen.name], read


def _changed_home(world: World, name: str, folder: Path, rng: random.Random) -> tuple[Path, str]:
    home = _HOMES.get(name, name)
    shutil.copytree(world.root / "eval" / home, folder / home, symlinks=True)
    kinds = (".json", ".jsonl", ".txt")
    paths = [path for path in (folder / home).rglob("*") if path.suffix in kinds and path.is_file()]
    by_suffix: dict[tuple, list[Path]] = {}
    for path in sorted(paths):
        by_suffix.setdefault((path.parent, path.suffix), []).append(path)
    path = rng.choice(rng.choice(list(by_suffix.values())))
    content, words = mutations.of_file(path.read_bytes(), path.name, rng)
    path.unlink()
    write(path, content, folder)
    return path, words


def answers(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A file of answers to one of LLaVA's benchmarks."""
    from llava_compodistill.eval.benchmarks import registered
    from llava_compodistill.eval.benchmarks.llava import LlavaBenchmark

    chosen = rng.choice(list(registered(LlavaBenchmark).values()))
    (folder / chosen.questions.split("/")[0]).symlink_to(world.root / "eval" / chosen.questions.split("/")[0])
    path = _answers(folder, chosen, folder / "answers.jsonl", rng)
    content, words = mutations.of_file(path.read_bytes(), path.name, rng)
    write(path, content, folder)
    # Of two files that do not fit together either may be the wrong one.
    home = f"/{chosen.questions.split('/')[0]}/"
    return f"{chosen.name}: {words}", [path.name, home], lambda: _score_answers(chosen, folder, path)


def _answers(folder: Path, chosen: Any, path: Path, rng: random.Random) -> Path:
    from llava_compodistill.eval.benchmarks.llava import read_questions

    lines = [
        {
            "question_id": entry["question_id"],
            "prompt": entry["text"],
            "text": rng.choice(("Yes", "No", "red", "2", "")),
        }
        for entry in read_questions(folder / chosen.questions)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _score_answers(chosen: Any, folder: Path, path: Path) -> None:
    from llava_compodistill.eval.benchmarks.llava import read_answers
    from llava_compodistill.eval.records import scoring

    made = chosen.records(folder, read_answers(path))
    if made and {"label", "value"} & made[0].keys():
        with scoring(path, chosen.title):
            value = chosen.scored(made, "generate")["value"]
        insist(_is_share(value), f"a score of {value!r}")


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 100)


def records(world: World, folder: Path, rng: random.Random) -> Prepared:
    """Records or a summary of an evaluation, as `compare` or a resumed `eval` reads them."""
    from commands import BENCHMARKS

    name = rng.choice(BENCHMARKS.split(","))
    for model in ("one", "two"):
        shutil.copytree(world.root / "asked", folder / model)
    path = folder / "two" / rng.choice((f"{name}.json", f"{name}.jsonl", f"{name}.jsonl", f"{name}.jsonl.run.json"))
    content, words = mutations.of_file(path.read_bytes(), path.name, rng)
    write(path, content, folder)
    read = _resume_records if path.name.endswith(".run.json") or rng.random() < 0.3 else _compare
    return f"{path.name}: {words}", [path.name, f"{name}.json"], lambda: read(folder, name, world)


def _compare(folder: Path, name: str, world: World) -> None:
    from llava_compodistill.eval.compare import compare, grouped

    groups = grouped([folder / "one" / f"{name}.json", folder / "two" / f"{name}.json"])
    for paths in groups.values():
        for row in compare(paths, samples=20):
            for key in ("value", "low", "high"):
                insist(_is_share(row[key]), f"{key} {row[key]!r}")


def _resume_records(folder: Path, name: str, world: World) -> None:
    from llava_compodistill.eval.benchmarks import get
    from llava_compodistill.eval.records import RecordFile, scoring

    run = json.loads((world.root / "asked" / f"{name}.jsonl.run.json").read_text())
    lines = (world.root / "asked" / f"{name}.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    path = folder / "two" / f"{name}.jsonl"
    with RecordFile(path, run, ids) as found:
        insist(set(found.done) <= set(ids), "records of unknown items")
        made = [found.done[key] for key in ids if key in found.done]
    if len(made) == len(ids):
        with scoring(path, get(name).title):
            value = get(name).scored(made, run["protocol"])["value"]
        insist(_is_share(value), f"a score of {value!r}")
