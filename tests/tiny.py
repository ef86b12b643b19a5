"""Tiny models and data for the tests: real architectures and files, random weights, made in a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from miniature import language_models, tokenizer, tower
from miniature.dataset import WorldConfig, write_dataset

NO_STEPS = language_models.PretrainSettings(steps=0)
# Every size is given, so that the tests do not move with the miniature's settings.
STUDENT = replace(
    language_models.STUDENT,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TEACHER = replace(
    language_models.TEACHER,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
)
ROUNDS = [
    ("What color is the square?", "Red"),
    ("Describe the image.", "a red square above a blue circle"),
    ("How many objects are there?", "2"),
    ("Is the circle below the square?", "Yes"),
    ("Which color do you see?", "red and blue"),
]


def make_world(root: Path) -> dict[str, Path]:
    """Data, tokenizer, tower and two base language models (with weights that are random, not trained)."""
    paths = {name: root / name for name in ("data", "tokenizer", "siglip", "qwen-student", "qwen-teacher", "llama")}
    write_dataset(paths["data"], WorldConfig.preset("smoke"), progress=False)
    tokenizer.train_tokenizer(paths["tokenizer"])
    torch.manual_seed(0)
    tower.save_tower(tower.build_tower(tower.TowerSettings()), paths["siglip"])
    language_models.build_language_model(paths["qwen-student"], paths["tokenizer"], STUDENT, NO_STEPS, progress=False)
    language_models.build_language_model(paths["qwen-teacher"], paths["tokenizer"], TEACHER, NO_STEPS, progress=False)
    _make_llama(paths["llama"], paths["tokenizer"])
    return paths


def _make_llama(path: Path, tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(1)
    config = language_models.llama_config(STUDENT, AutoTokenizer.from_pretrained(str(tokenizer_path)))
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (path / name).write_bytes((tokenizer_path / name).read_bytes())


def sample(number: int, image: str | None, rounds: int) -> dict:
    """A sample of LLaVA's data with an image or, for None, of text alone."""
    turns = []
    for place in range(rounds):
        question, answer = ROUNDS[(number + place) % len(ROUNDS)]
        marker = "<image>\n" if image is not None and place == 0 else ""
        turns += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": f"sample-{number}", "conversations": turns, **({} if image is None else {"image": image})}


def flags(world: dict[str, Path], stage: str, output: Path, **changes: object) -> list[str]:
    """A command line for `llava_compodistill.train` on the tiny world; a change to None drops the flag."""
    data = "pretrain.json" if stage in ("pt", "dpt") else "instruct_student.json"
    values: dict[str, object] = {
        "stage": stage,
        "model_name_or_path": world["qwen-student"],
        "version": "plain" if stage in ("pt", "dpt") else "qwen_1_5",
        "data_path": world["data"] / data,
        "image_folder": world["data"] / "images",
        "vision_tower": world["siglip"],
        "mm_projector_type": "taf",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "model_max_length": 512,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
    }
    values.update(changes)
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def run(world: dict[str, Path], stage: str, output: Path, **changes: object):
    """Run a stage in this process and return its trainer."""
    from llava_compodistill import train

    return train.main(flags(world, stage, output, **changes))


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: they find the package where this process found it."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


_EACH = """
import json, os, sys, traceback
path, codes = json.loads(sys.stdin.read())
sys.path[:] = path
import torch, transformers.models.qwen2.modeling_qwen2
for number, code in enumerate(codes):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        status = 1
        try:
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def python_each(codes: list[str], path: list[str]) -> list[tuple[int, str]]:
    """Run each code as in an interpreter of its own: (exit status, what it printed). They share what takes longest,
    the import of torch and transformers, and none sees what another has imported.

    Args:
        path: the interpreters' sys.path.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _EACH], input=json.dumps([[part for part in path if part], codes]), cwd=folder,
            capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts = [(Path(folder) / f"{number}.txt").read_text() for number in range(len(codes))]
    return list(zip(map(int, done.stdout.split()), texts, strict=True))


def read_log(output: Path) -> list[dict]:
    """The logged steps of a finished run."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
