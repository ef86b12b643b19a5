"""What the tests share: a tiny world, and a teacher and a DPT adapter that the package's own commands have trained."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, Path]:
    """Data, tokenizer, tower and base language models (`tiny.make_world`)."""
    import tiny

    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    """A random SigLIP tower: 56 pixels, 16 patches (`factory.save_tower`)."""
    import factory

    return factory.save_tower(tmp_path_factory.mktemp("towers") / "siglip")


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
def dpt_path(world, teacher_path, tmp_path_factory) -> Path:
    """A DPT checkpoint: config.json and mm_projector.bin."""
    import tiny

    output = tmp_path_factory.mktemp("dpt") / "dpt"
    tiny.run(world, "dpt", output, teacher_model_path=teacher_path)
    return output


@pytest.fixture(autouse=True)
def no_precision_left_behind():
    """transformers 4.37 puts a run's precision into the environment, where the next run of the process finds it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
