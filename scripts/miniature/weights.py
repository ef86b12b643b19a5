"""The small weights that lie beside the code: tokenizer, tower, the student's base model and two teachers.

They were made by `llava-compodistill miniature quickstart --from-scratch` (the second teacher by `reproduce second`)
and frozen with `miniature store-weights`; the manifest beside them records the settings, versions and commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_compodistill.about import __version__

STORED = Path(__file__).resolve().parent / "weights"
TEACHERS = ("llava-teacher", "llava-second-teacher")
FOLDERS = ("tokenizer", "siglip", "qwen-student", *TEACHERS)
#: Files that a run leaves beside a model. A stored evaluation would pass for that of every later run's teacher.
OF_A_RUN = ("trainer_state.", "evaluation-", "compodistill_run.", "data_manifest.")


def have_stored_weights() -> bool:
    """Whether this checkout has the weights."""
    return (STORED / "manifest.json").is_file()


def install(models: Path) -> dict:
    """Copy the stored weights to a run's `models` folder; returns their manifest."""
    for name in FOLDERS:
        shutil.copytree(STORED / name, models / name, dirs_exist_ok=True)
    for name in TEACHERS:
        set_tower_path(models / name, models / "siglip")
    return json.loads((STORED / "manifest.json").read_text(encoding="utf-8"))


def set_tower_path(model: Path, tower: Path) -> None:
    """LLaVA finds the encoder by the path in the model's config, which is another one on every machine."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["mm_vision_tower"] = str(tower.resolve())
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def store(models: Path, manifest: dict, out: Path = STORED) -> None:
    """Freeze a run's models as the stored ones, in fp16 (about half the size; the figures are measured with these)."""
    from safetensors.torch import load_file, save_file

    for name in FOLDERS:
        if name == TEACHERS[1] and not (models / name).is_dir():
            continue  # a run makes it for those studies alone that ask for it
        target = out / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in sorted((models / name).iterdir()):
            if path.suffix == ".safetensors":
                weights = {key: value.half().contiguous() for key, value in load_file(path).items()}
                save_file(weights, target / path.name, metadata={"format": "pt"})
            elif path.suffix in (".json", ".txt") and not path.name.startswith(OF_A_RUN):
                shutil.copy(path, target / path.name)
        if name in TEACHERS:
            _make_portable(target, models / "tokenizer")
    (out / "manifest.json").write_text(
        json.dumps({"version": __version__, **manifest}, indent=1) + "\n", encoding="utf-8"
    )


def _make_portable(teacher: Path, tokenizer: Path) -> None:
    # The world's own tokenizer files, which both generations of transformers read, instead of one version's dialect.
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copy(path, teacher / path.name)
    path = teacher / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["mm_vision_tower"] = "siglip"
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
