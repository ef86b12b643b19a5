"""What the READMEs promise: examples that run as they stand, links that lead somewhere, names that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TRAINING = ROOT / "llava_compodistill" / "train" / "README.md"
GUIDES = [ROOT / "scripts" / "README.md", ROOT / "scripts" / "eval" / "README.md", TRAINING]
#: Scripts of LLaVA's own that the guides name.
OF_LLAVA = {"scripts/merge_lora_weights.py"}
# In the example the paths of full-size models and data, in the test the tiny ones: nothing else is replaced.
STUDENT = "Qwen/Qwen1.5-1.8B"
TOWER = "google/siglip-so400m-patch14-384"
TEACHER = "./checkpoints/llava-qwen1.5-4b"
DPT = "./checkpoints/llava-compodistill-qwen1.5-1.8b-dpt"
OUTPUT = "./checkpoints/llava-compodistill-qwen1.5-1.8b-dft"
DATA = "./playground/data/llava_v1_5_mix665k.json"
IMAGES = "./playground/data"


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=tiny.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_the_training_example_trains_what_the_command_trains(world, teacher_path, dpt_path, mixed, tmp_path):
    (code,) = (block for block in blocks(TRAINING) if "CompoDistillTrainer" in block)
    replaced = {
        STUDENT: world["qwen-student"],
        TOWER: world["siglip"],
        DPT: dpt_path,
        OUTPUT: tmp_path / "example",
        TEACHER: teacher_path,
        DATA: mixed,
        IMAGES: world["data"] / "images",
    }
    for path, stand_in in replaced.items():
        assert code.count(f'"{path}') == 1, path
        code = code.replace(f'"{path}', f'"{stand_in}')
    python(code, tmp_path)
    tiny.run(
        world,
        "dft",
        tmp_path / "command",
        teacher_model_path=teacher_path,
        pretrain_mm_mlp_adapter=dpt_path / "mm_projector.bin",
        data_path=mixed,
        image_aspect_ratio="pad",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=32,
        learning_rate=1e-4,
        num_train_epochs=1,
        max_steps=-1,
        model_max_length=2048,
        group_by_modality_length=True,
    )
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("example", "command"))
    start = load_file(world["qwen-student"] / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert any((found[name] != start[name]).any() for name in start), "nothing was trained"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        # What the folders are called is all that may differ.
        texts = [
            (tmp_path / run / name).read_text().replace(str(tmp_path / run), "") for run in ("example", "command")
        ]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
        for path in (README, *GUIDES)
        for number, block in enumerate(blocks(path))
        if "CompoDistillTrainer" not in block
    ],
)
def test_the_other_examples_run(code, tmp_path):
    python(code, tmp_path)


@pytest.mark.parametrize("path", [README, *GUIDES[:2]], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8"))
    assert links
    missing = []
    for link in links:
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists():
            missing.append(link)
        elif heading:
            text = target.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            if heading not in anchors:
                missing.append(link)
    assert not missing


def test_scripts_that_are_named_exist():
    for path in (README, *GUIDES):
        for name in re.findall(r"scripts/[\w/]+\.(?:sh|py|json)", path.read_text(encoding="utf-8")):
            assert name in OF_LLAVA or (ROOT / name).is_file(), f"{path.name}: {name}"
    listed = set(re.findall(r"^\| `(\w+\.sh)` \|", GUIDES[0].read_text(encoding="utf-8"), re.MULTILINE))
    sourced = {"launch.sh", "setup_env.sh"}
    assert listed == {path.name for path in (ROOT / "scripts").glob("*.sh")} - sourced


def test_the_readme_names_every_room_and_stays_short():
    text = README.read_text(encoding="utf-8")
    tree = text[text.index("## Where things are") :]
    package = ROOT / "llava_compodistill"
    names = [f"{path.name}/" for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    names += [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in names if name not in tree] == []
    assert len(text.splitlines()) <= 240


@pytest.mark.once  # transformers 4.37 lacks a flag of its own that the guide names
def test_flags_in_the_guide_are_the_parsers():
    from llava_compodistill.train.arguments import DataArguments, ModelArguments, TrainingArguments

    known = {name for kind in (ModelArguments, DataArguments, TrainingArguments) for name in kind.__dataclass_fields__}
    text = GUIDES[0].read_text(encoding="utf-8")
    table = text[text.index("| flag | values") :].split("\n\n")[0]
    flags = re.findall(r"--(\w+)", table)
    assert len(flags) > 20 and [flag for flag in flags if flag not in known] == []


def test_settings_in_the_guide_are_the_scripts():
    """Every variable that an example sets is one that a script reads."""
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh"))
    outside = {"CUDA_VISIBLE_DEVICES"}
    for path in (README, GUIDES[0]):
        for line in "\n".join(blocks(path, "bash")).splitlines():
            for name in re.findall(r"\b([A-Z][A-Z_]+)=", line.partition("#")[0]):
                assert name in outside or f"${{{name}:-" in scripts, f"{path.name}: {name}"
