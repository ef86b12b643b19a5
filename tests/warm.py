"""An interpreter that has imported PyTorch, transformers and LLaVA already: tests that call commands wait for little
else. A server forks a process for each call, with the caller's arguments, folder, environment and streams. On the CPU
alone: a process that holds a GPU cannot be forked.

Not for tests of processes themselves (signals to a group, imports, memory): these start the real one.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

#: The caller's side. It must start fast, so it imports little.
_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
arguments = sys.argv[1:]
if arguments[:1] != ["-m"] and not (arguments and arguments[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(asked)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(process, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def start(folder: Path) -> Path:
    """Start the server, which ends when the tests have.

    Returns:
        An executable, to be called as the interpreter is: `-m MODULE …` or `FILE.py …`; it leaves everything else to
        the real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    python, address = folder / "python", folder / "socket"
    python.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    path = os.pathsep.join(folder for folder in sys.path if folder)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(address), str(python), str(owner)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    assert server.stdout is not None
    if server.stdout.readline() != "ready\n":
        raise RuntimeError((folder / "log").read_text())
    return python


def serve(address: str, python: str, owner: int) -> None:
    """Fork a process for every caller, until the owner's process has gone."""
    import torch

    torch.set_num_threads(1)
    import transformers.models.qwen2.modeling_qwen2
    import transformers.trainer  # noqa: F401

    import llava_compodistill.eval.cli
    import llava_compodistill.train.run  # noqa: F401

    sys.executable = python  # what is called here may call others
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    listening.settimeout(1)
    print("ready", flush=True)
    while Path("/proc", str(owner)).exists():
        with contextlib.suppress(TimeoutError):
            caller, _ = listening.accept()
            if not os.fork():
                listening.close()
                caller.setblocking(True)
                _attend(caller)
            caller.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _attend(caller: socket.socket) -> None:
    """Between the caller and the process that does its work."""
    size, streams = _received(caller)
    arguments, folder, environment = json.loads(caller.makefile("rb").read(size))
    worker = os.fork()
    if not worker:
        _work(arguments, folder, environment, streams)
    caller.sendall(f"{worker}\n".encode())
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(OSError):  # the caller may have been killed
        caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _received(caller: socket.socket) -> tuple[int, list[int]]:
    """The request's size, and the caller's streams."""
    streams = array.array("i")
    size, ancillary, *_ = caller.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            streams.frombytes(data)
    return int.from_bytes(size, "big"), list(streams)


def _work(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        import torch

        # A fork leaves PyTorch without its pool of threads. The first call makes it anew.
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
        sys.path[:] = [*environment.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
        if arguments[0] == "-m":
            sys.path.insert(0, folder)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    # This file's folder is not where modules are to be found.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
