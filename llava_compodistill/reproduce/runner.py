"""Runs training scripts and commands of this package in processes of their own, each with a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..about import folder
from ..errors import CompoDistillError

#: The Trainer prints a line a logged step.
_LOGGED = re.compile(r"^\{'loss'")


class StageFailed(CompoDistillError, RuntimeError):
    """A script or command ended with an error; the message holds the end of its log."""


def run_script(
    name: str,
    environment: Mapping[str, object],
    flags: Sequence[str],
    log: Path,
    threads: int,
    on_log: Callable[[], None] = lambda: None,
) -> float:
    """Run a training script and return its seconds. Its output goes to `log`, and its end is shown when it fails.

    Args:
        threads: of each process (OMP_NUM_THREADS).
        on_log: called for each step that training logs.

    Raises:
        StageFailed: when the script does.
    """
    variables = {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    return _run(name, ["bash", str(folder("scripts") / name), *flags], variables, log, on_log)


def run_command(arguments: Sequence[str], environment: Mapping[str, object], log: Path) -> float:
    """Run a subcommand of llava-compodistill, as `run_script` runs a script."""
    command = [sys.executable, "-m", "llava_compodistill.cli", *arguments]
    return _run(f"llava-compodistill {arguments[0]}", command, environment, log)


def _run(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, object],
    log: Path,
    on_log: Callable[[], None] = lambda: None,
) -> float:
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **{key: str(value) for key, value in environment.items()},
    }
    started = time.monotonic()
    with log.open("a", encoding="utf-8", buffering=1) as file:  # a resumed run goes on in its log
        process = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if _LOGGED.match(line):
                    on_log()
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code != 0:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        raise StageFailed(f"{name} ended with status {code}; the end of {log}:\n{tail}")
    return time.monotonic() - started
