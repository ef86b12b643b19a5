"""The walk-through of the README in a LLaVA checkout laid out from the registry's llava-torch: init, the real scripts
from the teacher to SFT, LLaVA's own evaluation, unmodified.

LLAVA_CHECKOUT=/path/to/LLaVA runs it in a clone of a git checkout instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

# What the scripts call the folders of models named qwen-student and qwen-teacher.
TEACHER = "llava-qwen-teacher"
STUDENT = f"llava-compodistill-qwen-student-from-{TEACHER}"


@pytest.fixture(scope="module")
def checkout(world, tmp_path_factory) -> Path:
    import llava

    root = tmp_path_factory.mktemp("LLaVA")
    if "LLAVA_CHECKOUT" in os.environ:
        run(root, "git", "clone", "--quiet", os.environ["LLAVA_CHECKOUT"], ".")
        run(root, sys.executable, "-m", "llava_compodistill.cli", "init", ".", "--patch")
        found = run(root, sys.executable, "-c", "import llava; print(llava.__path__[0])")
        assert Path(found.strip()) == root / "llava"
        return root
    shutil.copytree(Path(llava.__file__).parent, root / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    run(root, sys.executable, "-m", "llava_compodistill.cli", "init", ".")
    return root


def run(cwd: Path, *command: object, **environment: object) -> str:
    """Run in the checkout; the output is shown when the command fails."""
    variables = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: str(value) for name, value in environment.items()},
    }
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(checkout, world, warm_python) -> Path:
    """teacher_pretrain, teacher_finetune, dpt, dft and sft through the checkout's scripts, two steps each; some of
    them in a process that has imported everything, LLaVA from where it is installed."""
    data = {"IMAGES": world["data"] / "images", "TOWER": world["siglip"], "GRADIENT_CHECKPOINTING": "True"}
    sizes = {"BATCH": 2, "GLOBAL_BATCH": 4, "WORKERS": 0, "MAX_LENGTH": 512}
    captions = {**data, **sizes, "DATA": world["data"] / "pretrain.json"}
    instructions = {**data, **sizes, "DATA": world["data"] / "instruct_student.json"}
    flags = ["--max_steps", "2", "--save_strategy", "no"]

    def script(name: str, **environment: object) -> None:
        run(checkout, "bash", f"scripts/{name}", *flags, **environment)

    quick = {} if "LLAVA_CHECKOUT" in os.environ else {"PYTHON": warm_python}
    script("teacher_pretrain.sh", TEACHER_LLM=world["qwen-teacher"], **captions, **quick)
    script("teacher_finetune.sh", TEACHER_LLM=world["qwen-teacher"], **instructions, **quick)
    pair = {"STUDENT": world["qwen-student"], "TEACHER": f"./checkpoints/{TEACHER}"}
    script("dpt.sh", **pair, **captions)
    script("dft.sh", **pair, **instructions)
    script("sft.sh", **pair, **instructions, **quick)
    return checkout / "checkpoints"


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = folder / "mm_projector.bin"
    weights = torch.load(path, weights_only=True) if path.is_file() else load_file(folder / "model.safetensors")
    return {name.split("mm_projector.")[1]: value for name, value in weights.items() if "mm_projector." in name}


def test_teacher_adapter_is_the_same_bits_from_teacher_to_student(trained):
    teacher = read_adapter(trained / TEACHER)
    for stage in ("-dpt", "-dft", ""):
        student = read_adapter(trained / f"{STUDENT}{stage}")
        for name, value in teacher.items():
            assert torch.equal(student[f"teacher_adapter.{name}"], value), (stage, name)


def test_stages_log_their_terms(trained):
    terms = {}
    for stage in ("-dpt", "-dft", ""):
        state = json.loads((trained / f"{STUDENT}{stage}" / "trainer_state.json").read_text())
        terms[stage] = set(state["log_history"][0]) & {"lm", "kl", "attention", "attention_similarity"}
    assert terms == {"-dpt": {"lm", "kl"}, "-dft": {"lm", "kl", "attention", "attention_similarity"}, "": {"lm"}}


@pytest.mark.once  # test_eval_scripts.py runs it in both
@pytest.mark.long
def test_llavas_own_evaluation_answers_with_the_student(trained, checkout, world):
    """model_vqa_loader as LLaVA has it; only the launcher knows of the plugin. (Its scorers: test_eval_scripts.py.)"""
    questions = [json.loads(line) for line in (world["data"] / "recognition_val.jsonl").read_text().splitlines()][:6]
    (checkout / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    run(
        checkout,
        *(sys.executable, "-m", "llava_compodistill.cli", "run", "llava.eval.model_vqa_loader"),
        *("--model-path", trained / STUDENT),
        *("--question-file", "questions.jsonl"),
        *("--image-folder", world["data"] / "images"),
        *("--answers-file", "answers/student.jsonl"),
        *("--conv-mode", "qwen_1_5", "--temperature", "0", "--max_new_tokens", "8"),
    )
    answers = [json.loads(line) for line in (checkout / "answers" / "student.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [question["question_id"] for question in questions]


@pytest.mark.once
@pytest.mark.long
def test_quickstart_smoke(tmp_path):
    """The whole miniature experiment in seconds, through the same code as the real one."""
    quickstart = [sys.executable, Path(__file__).parents[1] / "scripts" / "miniature", "quickstart", "--smoke"]
    run(tmp_path, *quickstart, "--methods", "compodistill", "--output", "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["teacher", "compodistill"]
