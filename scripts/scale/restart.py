"""Two machines, one of which is killed and comes back: python scripts/scale/restart.py

Two torchrun agents on two loopback addresses of this machine, 127.0.0.1 and 127.0.0.2, each started by dpt.sh with the
settings of several machines. The second is killed with all its processes, and started again. The run has to go on
from its last checkpoint, with the log and the weights of one that was not broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from scale import world  # noqa: E402
from scale.matrix import apart, made_with, read_log, weights_in  # noqa: E402

STEPS = 30
KILLED_AFTER = 5
ADDRESSES = ("127.0.0.1", "127.0.0.2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file of what came of it")
    parser.add_argument("--keep", type=Path, help="an empty folder for all files, which stay there")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="restart-"))
    try:
        found = run(world.make(folder.resolve()))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.output:
        args.output.write_text(json.dumps({**made_with(), **found}, indent=1) + "\n")
    return int(not found["holds"])


def run(here: world.World) -> dict[str, object]:
    """The unbroken run and the broken one. Statuses of the machines, and how far the results are apart."""
    unbroken, broken = here.root / "unbroken", here.root / "broken"
    machines = [_Machine(here, number, unbroken, port) for port in [_free_port()] for number in (0, 1)]
    first = [machine.wait() for machine in machines]
    if any(first):
        raise RuntimeError(f"The unbroken run ended with {first}:\n{machines[0].text()}\n{machines[1].text()}")
    port = _free_port()
    machines = [_Machine(here, number, broken, port) for number in (0, 1)]
    _wait_for(broken / f"checkpoint-{KILLED_AFTER}" / "checkpoint_manifest.json", machines)
    machines[1].kill()
    killed = time.monotonic()
    at = _newest(broken)
    machines[1] = _Machine(here, 1, broken, port, again=True)
    _wait_for(broken / f"checkpoint-{at + 2}" / "checkpoint_manifest.json", machines)
    went_on = time.monotonic() - killed
    statuses = [machine.wait() for machine in machines]
    steps = [entry["step"] for entry in read_log(broken)]
    difference = apart(weights_in(broken), weights_in(unbroken))[0]
    return {
        "killed_at_step": at,
        "seconds_until_it_went_on": round(went_on, 1),
        "statuses": statuses,
        "every_step_once": steps == list(range(1, STEPS + 1)),
        "weights_apart": difference,
        "holds": not any(statuses) and steps == list(range(1, STEPS + 1)) and difference == 0,
    }


class _Machine:
    def __init__(self, here: world.World, number: int, output: Path, port: int, again: bool = False):
        models = here.root / "models"
        settings = {
            "STUDENT": models / "qwen-student", "TEACHER": models / "llava-teacher", "TOWER": models / "siglip",
            "DATA": here.root / "captions.json", "IMAGES": here.root / "data" / "images", "OUTPUT": output,
            "GLOBAL_BATCH": 4, "BATCH": 1, "WORKERS": 0, "GRADIENT_CHECKPOINTING": False, "SAVE_STEPS": 1,
            "GPUS": 0, "HAS_BF16": 0, "HAS_TF32": 0, "HAS_DEEPSPEED": 0, "LAUNCHER": "torchrun", "NPROC": 1,
            "NNODES": 2, "NODE_RANK": number, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port, "MAX_RESTARTS": 3,
            "LAUNCHER_ARGS": f"--local_addr {ADDRESSES[number]}", "PYTHON": sys.executable, "PYTHONPATH": ROOT,
            "OMP_NUM_THREADS": 1, "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        flags = ["--max_steps", str(STEPS), "--ddp_backend", "gloo", "--blind", "off", "--disable_tqdm", "True"]
        self.log = here.root / f"{output.name}-{number}{'-again' if again else ''}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "scripts" / "dpt.sh"), *flags], stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            )  # fmt: skip

    def kill(self) -> None:
        """Like a power cut: script, agent and ranks at once."""
        for pid in _tree(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(240)

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _tree(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def _wait_for(path: Path, machines: list[_Machine], seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists() and not (path.parents[1] / f"checkpoint-{STEPS}").exists():
        ended = [machine.process.poll() for machine in machines]
        if any(ended) or time.monotonic() > until:
            texts = "\n".join(machine.text() for machine in machines)
            for machine in machines:
                if machine.process.poll() is None:
                    machine.kill()
            raise RuntimeError(f"{path} has not come; the machines ended with {ended}:\n{texts}")
        time.sleep(0.02)


def _newest(output: Path) -> int:
    return max(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((ADDRESSES[0], 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
