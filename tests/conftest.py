"""What the tests share: a tiny world, models on it (random, or trained by the package's own commands), DFT runs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A name that is no folder is looked for on the hub, again and again where there is no network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
pytest.register_assert_rewrite("checks", "vqa")
#: The miniature world is not in the wheel: it comes from the checkout that these tests lie in.
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))


#: The files that take longest, longest first. scripts/test.sh hands out whole files in this order, so that no process
#: is left with one of them at the end.
LONGEST = (
    "test_eval_scripts",
    "test_distributed",
    "test_own_answers",
    "test_pinned_runs",
    "test_visual_attention_triton",
    "test_training_steps",
    "test_end_to_end",  # by now the smoke run, which it shares with test_eval_scripts, has been made
    "test_checkout",
    "test_benchmark",
    "test_rivals",
    "test_reproduce",
    "test_methods",
    "test_fullsize",
    "test_unlike_tokenizers",
    "test_trained_tower",
    "test_training_terms",
    "test_layers_by_sight",
    "test_analysis",
    "test_sight",
    "test_newer_families",
    "test_reproduce_figures",
    "test_resume",
    "test_registration",
    "test_cut_answers",
    "test_zero3_stages",
    "test_runner",
    "test_checkpoint",
    "test_eval_suite",
)


def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once for all processes of pytest-xdist: the others wait for the first. For what is
    expensive, and not changed by the tests that use it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder of its own in there
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, Path]:
    """Data, tokenizer, tower and base language models (`tiny.make_world`)."""
    import tiny

    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def ranks():
    """Runs of several processes, which need not import everything each (`scale.ranks`)."""
    from scale.ranks import Ranks

    with Ranks() as server:
        yield server


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory) -> str:
    """An interpreter that need not import everything (`warm`), for commands and scripts."""
    import warm

    return str(made_once(tmp_path_factory, "warm", warm.start) / "python")


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    """A random SigLIP tower: 56 pixels, 16 patches (`factory.save_tower`)."""
    import factory

    return factory.save_tower(tmp_path_factory.mktemp("towers") / "siglip")


@pytest.fixture(scope="session")
def checkpoints(world, siglip, tmp_path_factory) -> dict[str, Path]:
    """{family: folder} of random LLaVA models with a vocabulary padded beyond the tokenizer's."""
    import factory

    root = tmp_path_factory.mktemp("checkpoints")
    folders = {}
    for family in ("qwen2", "llama", "mistral"):
        model = factory.make_model(siglip, family, vocab=1024, dtype=torch.float32)
        folders[family] = factory.checkpoint_folder(root / f"llava-{family}", model, world["tokenizer"])
    return folders


@pytest.fixture(scope="session")
def teacher_path(world, tmp_path_factory) -> Path:
    """A tiny LLaVA teacher with an ordinary adapter, made by two steps of pt and of sft each."""
    import tiny

    root = tmp_path_factory.mktemp("teacher")
    teacher = {"model_name_or_path": world["qwen-teacher"], "mm_projector_type": "mlp2x_gelu"}
    tiny.run(world, "pt", root / "pt", **teacher)
    adapter = root / "pt" / "mm_projector.bin"
    tiny.run(world, "sft", root / "llava-teacher", pretrain_mm_mlp_adapter=adapter, **teacher)
    return root / "llava-teacher"


@pytest.fixture(scope="session")
def distilled(tmp_path_factory) -> Path:
    """The miniature's smoke data, its stored models in models/, and llava-student, distilled from the stored teacher
    in two steps a stage."""
    import tiny

    from miniature import weights
    from miniature.dataset import WorldConfig, write_dataset

    def make(folder: Path) -> None:
        write_dataset(folder / "data", WorldConfig.preset("smoke"), progress=False)
        weights.install(folder / "models")
        world = {"data": folder / "data", **{name: folder / "models" / name for name in weights.FOLDERS}}
        options = {"teacher_model_path": world["llava-teacher"], "model_max_length": 1024}
        instruct = {"version": "qwen_qa"}
        tiny.run(world, "dpt", folder / "dpt", **options)
        adapter = folder / "dpt" / "mm_projector.bin"
        tiny.run(world, "dft", folder / "dft", pretrain_mm_mlp_adapter=adapter, **instruct, **options)
        del options["teacher_model_path"]
        tiny.run(world, "sft", folder / "llava-student", model_name_or_path=folder / "dft", **instruct, **options)

    return made_once(tmp_path_factory, "distilled", make)


@pytest.fixture(scope="session")
def dpt_path(world, teacher_path, tmp_path_factory) -> Path:
    """A DPT checkpoint: config.json and mm_projector.bin."""
    import tiny

    output = tmp_path_factory.mktemp("dpt") / "dpt"
    tiny.run(world, "dpt", output, teacher_model_path=teacher_path)
    return output


@pytest.fixture(scope="session")
def mixed(world, tmp_path_factory):
    """16 samples: 12 with an image, 4 of text alone, one to three rounds each, answers of unequal length."""
    import tiny

    folder = world["data"] / "images"
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    samples = [tiny.sample(number, images[number] if number % 4 else None, 1 + number % 3) for number in range(16)]
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="session")
def sharp_teacher(teacher_path, tmp_path_factory):
    """The teacher with attention far from uniform, so that there is something to align with."""
    path = tmp_path_factory.mktemp("sharp") / "llava-sharp"
    shutil.copytree(teacher_path, path)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = weight * 0.25 / weight.std()
        elif "mm_projector" in name and name.endswith("weight"):
            weights[name] = weight * 0.3 / weight.std()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def dft(world, sharp_teacher, dpt_path, mixed, tmp_path):
    """Run DFT on the mixed data; returns (trainer, log)."""
    import tiny

    def run(name="dft", **changes):
        values = {
            "teacher_model_path": sharp_teacher,
            "mm_projector_type": "mlp2x_gelu",
            "data_path": mixed,
            "student_layers": "1,2,3",
            "teacher_layers": "1,2,3,4",
            **changes,
        }
        stage = values.pop("stage", "dft")
        trainer = tiny.run(world, stage, tmp_path / name, **values)
        return trainer, tiny.read_log(tmp_path / name)

    return run


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """Random inputs of a test do not depend on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_in_the_environment():
    """transformers puts a run's precision and FSDP into it, where the next run of the process finds them."""
    yield
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
