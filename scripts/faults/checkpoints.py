"""Checkpoint folders that are not what they should be, through the loader of `eval` and the search for a checkpoint to
resume from."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damages
import mutations
from readers import MARKER, Prepared, insist, write
from world import World

KINDS = {"full": "dft", "lora": "dft-lora", "adapter": "dpt"}
#: Of a run, and read by nobody who loads a model.
_OF_THE_RUN = ("training_args.bin", "trainer_state.json", "data_manifest.json", "compodistill_run.json")
_CODE = "open({marker!r}, 'w').close()\n"
_shapes: dict[str, dict[str, tuple[int, ...]]] = {}


def prepare(world: World) -> None:
    """The names and shapes of all weights, as they are loaded from sound folders."""
    for kind in KINDS:
        if kind not in _shapes:
            _shapes[kind] = {name: tuple(p.shape) for name, p in _load(world, world.root / KINDS[kind], kind)}


def _load(world: World, folder: Path, kind: str) -> list[tuple[str, Any]]:
    from llava_compodistill.hosts.llava import import_llava, register

    register(train=True)
    loader = import_llava("llava.model.builder").load_pretrained_model
    base = None if kind == "full" else str(world.root / "models" / "qwen-student")
    tokenizer, model, _, _ = loader(str(folder), base, folder.name, device="cpu")
    insist(len(tokenizer) <= model.get_input_embeddings().num_embeddings, "more tokens than embeddings")
    return list(model.named_parameters())


def checkpoint(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A file of a full, LoRA or adapter checkpoint; or one beside it that wants to be run."""
    kind = rng.choice(list(KINDS))
    place = folder / f"llava-{kind}"
    shutil.copytree(world.root / KINDS[kind], place, ignore=shutil.ignore_patterns("checkpoint-*", *_OF_THE_RUN))
    path, words = _change(place, folder, rng)

    def read() -> None:
        from llava_compodistill.eval.checkpoint import check_checkpoint

        check_checkpoint(str(place), None)
        found = _load(world, place, kind)
        shapes = {name: tuple(parameter.shape) for name, parameter in found}
        apart = [name for name in {**shapes, **_shapes[kind]} if shapes.get(name) != _shapes[kind].get(name)]
        insist(not apart, f"{len(apart)} weights of other names or shapes, such as {apart[:1]}")
        broken = [name for name, parameter in found if not bool(parameter.isfinite().all())]
        insist(not broken, f"{len(broken)} weights are no finite numbers, such as {broken[:1]}")

    return f"{kind}, {path.name}: {words}", [path.name, place.name], read


def resume(world: World, folder: Path, rng: random.Random) -> Prepared:
    """A file of a run's newest checkpoint, as the same command looks for where to go on."""
    kind = rng.choice(list(KINDS))
    out = folder / "out"
    shutil.copytree(world.root / "stopped" / KINDS[kind], out)
    newest = max(out.iterdir(), key=lambda path: path.name)
    path, words = _change(newest, folder, rng)

    def read() -> None:
        import transformers

        from llava_compodistill.train import resume as resuming

        found = resuming.checkpoint_to_resume(str(out), {}, True)
        insist(found is not None, "the older checkpoint, which is whole, is not found")
        state = transformers.TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
        insist(isinstance(state.global_step, int) and state.global_step > 0, f"step {state.global_step!r}")

    return f"{kind}, {path.name}: {words}", [path.name, newest.name], read


def _change(place: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    path = rng.choice(sorted(path for path in place.iterdir() if path.is_file()))
    if rng.random() < 0.15:
        return _wants_to_run(place, folder, rng)
    data = path.read_bytes()
    if path.suffix == ".json":
        content, words = mutations.of_file(data, path.name, rng)
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        content, words = _safetensors(data, rng)
    elif path.suffix in damages.PICKLES and rng.random() < 0.7:
        content, words = _torch_file(data, folder / MARKER, rng)
    else:
        content, words = mutations.of_bytes(data, rng)
    write(path, content, folder)
    return path, words


def _safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return _safetensors_values(data, length, rng)
    header, words = mutations.of_json(json.loads(data[8 : 8 + length]), rng)
    text = mutations.dump(header)
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63 - 1, len(data)))
    return size.to_bytes(8, "little") + text + data[8 + length :], f"header, {words}"


def _safetensors_values(data: bytes, length: int, rng: random.Random) -> tuple[bytes, str]:
    """Numbers that are none, somewhere in the tensors."""
    import struct

    at = 8 + length + 2 * rng.randrange((len(data) - 8 - length) // 4) * 2
    value = rng.choice((float("nan"), float("inf"), 3e38))
    return data[:at] + struct.pack("<f", value) * 2 + data[at + 8 :], f"{value} among the numbers"


def _torch_file(data: bytes, marker: Path, rng: random.Random) -> tuple[bytes, str]:
    import torch

    def saved(content: Any) -> bytes:
        target = io.BytesIO()
        torch.save(content, target)
        return target.getvalue()

    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    if not isinstance(content, dict) or not content:
        return mutations.of_bytes(data, rng)
    name = rng.choice(list(content))
    value = content[name]
    kinds: dict[str, Callable[[], bytes]] = {
        "a payload": lambda: damages.payload(marker, rng),
        "a list": lambda: saved(list(content.values())),
        "a number": lambda: saved(7),
        "nothing": lambda: saved({}),
        "one is missing": lambda: saved({key: content[key] for key in content if key != name}),
        "one more": lambda: saved({**content, "model.extra.weight": torch.zeros(3)}),
        "a text": lambda: saved({**content, name: "text"}),
    }
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        kinds |= {
            "another shape": lambda: saved({**content, name: value.reshape(-1)[: value.numel() // 2].clone()}),
            "NaN": lambda: saved({**content, name: value * float("nan")}),
            "whole numbers": lambda: saved({**content, name: value.to(torch.int64)}),
            "other precision": lambda: saved({**content, name: value.half()}),
        }
    kind = rng.choice(list(kinds))
    return kinds[kind](), f"{kind} ({name})"


def _wants_to_run(place: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Code in the folder, and files that name it."""
    (place / "own.py").write_text(_CODE.format(marker=str(folder / MARKER)), encoding="utf-8")
    kind = rng.choice(("auto_map", "tokenizer", "model_type", "processor", "custom generate"))
    name = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    path = place / name
    config = json.loads(path.read_text(encoding="utf-8"))
    if kind == "auto_map":
        config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}
        config["model_type"] = rng.choice((config["model_type"], "own", "my_llava", "llava_mpt", "mpt"))
    elif kind == "tokenizer":
        config |= {
            "auto_map": {"AutoTokenizer": ["own.Own", None]},
            "tokenizer_class": rng.choice(("Own", "Qwen2Tokenizer")),
        }
    elif kind == "model_type":
        config["model_type"] = rng.choice(("own", "mpt", "llava_mpt", "llava", "qwen2", "", "llava_own"))
    elif kind == "processor":
        text = json.dumps({"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"})
        (place / "preprocessor_config.json").write_text(text, encoding="utf-8")
        config["mm_vision_tower"] = str(place)
    else:
        (place / "custom_generate").mkdir()
        shutil.copy(place / "own.py", place / "custom_generate" / "generate.py")
    path.write_text(json.dumps(config), encoding="utf-8")
    return path, f"code in the folder, by {kind}"
