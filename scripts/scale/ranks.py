"""Ranks without their imports: a server imports PyTorch, transformers, LLaVA and DeepSpeed once, and forks the
processes of each run, which takes a second instead of fifteen. They meet through torch's own environment variables
(RANK, MASTER_PORT, …), as under torchrun. On the CPU alone: a process that holds a GPU cannot be forked.

    with Ranks() as ranks:
        done = ranks.train(["--stage", "dft", …], processes=2, log=Path("log"))
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Seconds that the others get once a rank has failed, to fail with a message of their own.
GRACE = 8.0
_POLL = 0.02


@dataclass(frozen=True)
class Done:
    """A run that has ended.

    Attributes:
        statuses: of its ranks; negative for a signal.
        text: what they printed, rank by rank.
        seconds: from fork to end.
    """

    statuses: list[int]
    text: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(self.statuses)


class Ranks:
    """The server, as a context manager."""

    def __enter__(self) -> Ranks:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.stdin.close()
        self._server.wait(30)

    def train(
        self,
        flags: list[str],
        processes: int,
        log: Path,
        prelude: str = "",
        machines: bool = False,
        timeout: float = 240.0,
    ) -> Done:
        """`python -m llava_compodistill.train FLAGS` on some ranks.

        Args:
            log: the ranks' output goes to LOG.0, LOG.1, …
            prelude: Python that each rank runs first.
            machines: each rank is the only one of a machine, and {rank} in a flag its number.
        """
        job = {"flags": flags, "processes": processes, "log": str(log), "code": prelude, "machines": machines}
        return self._run(job, timeout)

    def train_well(self, flags: list[str], processes: int, log: Path, prelude: str = "") -> Done:
        """`train`, for a run that has to end well.

        Raises:
            AssertionError: it did not, with the end of what its ranks printed.
        """
        done = self.train(flags, processes, log, prelude)
        if not done.ok:
            raise AssertionError(f"statuses {done.statuses}\n{done.text[-6000:]}")
        return done

    def python(self, code: str, log: Path, processes: int = 1, machines: bool = False, timeout: float = 240.0) -> Done:
        """Python code on some ranks; see `train`."""
        job = {"flags": None, "processes": processes, "log": str(log), "code": code, "machines": machines}
        return self._run(job, timeout)

    def _run(self, job: dict[str, Any], timeout: float) -> Done:
        self._server.stdin.write(json.dumps({**job, "timeout": timeout}) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"The server of the ranks has ended with status {self._server.wait()}.")
        answer = json.loads(answer)
        texts = [Path(f"{job['log']}.{rank}").read_text(errors="replace") for rank in range(job["processes"])]
        return Done(answer["statuses"], "\n".join(texts), answer["seconds"])


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------
def serve() -> None:
    """Read jobs, one JSON object a line; answer each with the statuses of its ranks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    _import_all()
    for line in sys.stdin:
        job = json.loads(line)
        begun = time.monotonic()
        statuses = _wait(_fork(job), begun + job["timeout"])
        _import_what_a_rank_has(Path(f"{job['log']}.modules"))
        answers.write(json.dumps({"statuses": statuses, "seconds": time.monotonic() - begun}) + "\n")
        answers.flush()


def _import_all() -> None:
    import torch

    torch.set_num_threads(1)
    import transformers.models.qwen2.modeling_qwen2
    import transformers.trainer  # noqa: F401

    import llava_compodistill.train.run  # noqa: F401

    try:
        import deepspeed
    except ImportError:
        return
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # compiled on first use, not needed


def _import_what_a_rank_has(path: Path) -> None:
    """So that the next ones need not (DeepSpeed's ZeRO-3 imports a compiler that takes seconds)."""
    if not path.exists():
        return
    for name in path.read_text().split():
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # a module that was made, or that somebody has replaced
                importlib.import_module(name)
    path.unlink()


def _fork(job: dict[str, Any]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _live(job, rank, port)
        children.append(child)
    return children


def _live(job: dict[str, Any], rank: int, port: int) -> None:
    status = 1
    try:
        os.setsid()
        file = os.open(f"{job['log']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if job["processes"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
            place |= {"LOCAL_WORLD_SIZE": job["processes"], "MASTER_ADDR": "127.0.0.1"}
            if job["machines"]:
                place |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            os.environ.update({name: str(value) for name, value in place.items()})
        faulthandler.enable()
        import torch

        # A fork leaves PyTorch without its pool of threads. The first call makes it anew.
        torch.set_num_threads(1)
        exec(job["code"], {"__name__": "prelude"})
        status = 0
        if job["flags"] is not None:
            from llava_compodistill.train import run

            flags = [flag.replace("{rank}", str(rank)) for flag in job["flags"]] if job["machines"] else job["flags"]
            status = run.run_process(flags)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        if not rank:
            names = (name for name in list(sys.modules) if not name.startswith(("__", "llava.")))
            Path(f"{job['log']}.modules").write_text("\n".join(names))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int], until: float) -> list[int]:
    """The children's statuses. When one has failed the others are killed after a while, as launchers do."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    until = min(until, time.monotonic() + GRACE)
        if time.monotonic() > until:
            # First with the stacks of its threads, then for certain.
            number = signal.SIGABRT if time.monotonic() < until + 1 else signal.SIGKILL
            for child in children:
                if child not in statuses:
                    os.killpg(child, number)
            time.sleep(0.3)
        time.sleep(_POLL)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    # This file's folder is not where modules are to be found.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    serve()
