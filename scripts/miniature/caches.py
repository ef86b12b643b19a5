"""Caches of the teacher for the students of a grid: each is made once, by the command that users have."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_compodistill.about import folder
from llava_compodistill.reproduce.runner import run_command

#: What students may differ in that read one cache: it is about the teacher and what that reads.
_OF_STUDENTS = {
    "--data_seed",
    "--learning_rate",
    "--max_steps",
    "--output_dir",
    "--pretrain_mm_mlp_adapter",
    "--save_steps",
    "--save_strategy",
    "--save_total_limit",
    "--seed",
}


def cache_once(
    root: Path, options: str, script: str, environment: Mapping[str, object], flags: Sequence[str], threads: int
) -> dict[str, Any]:
    """A cache of what a training script's stage needs of its teacher; another student that makes it is waited for.

    Args:
        root: folder of the caches.
        options: of `llava-compodistill cache`, separated by spaces.
        script, environment, flags: of the stage.

    Returns:
        folder; seconds that it took; bytes.

    Raises:
        StageFailed: when the command does.
    """
    command = training_command(script, environment, flags)
    names = ["", *command]
    facts = [options] + [word for name, word in zip(names, command, strict=False) if not {name, word} & _OF_STUDENTS]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]
    output, record = root / key, root / f"{key}.json"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.is_file():
            shutil.rmtree(output, ignore_errors=True)
            started = time.monotonic()
            asked = ["cache", "--output", str(output), *options.split(), *command]
            run_command(asked, {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}, root / f"{key}.log")
            found = {"seconds": round(time.monotonic() - started, 1), "bytes": _size(output)}
            record.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return {"folder": str(output), **json.loads(record.read_text(encoding="utf-8"))}


def training_command(script: str, environment: Mapping[str, object], flags: Sequence[str]) -> list[str]:
    """The training command that a script would run."""
    variables = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1"}
    variables |= {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        ["bash", str(folder("scripts") / script), *flags], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\n\n").split("\n")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
