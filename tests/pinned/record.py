"""Writes down seeded training runs: every step's loss and gradient norm, and a hash of the final weights.

    python tests/pinned/record.py            runs everything, writes tests/pinned/transformers-VERSION-PROCESSOR.json
    python tests/pinned/record.py --check    runs everything, compares

`test_pinned_runs.py` does the latter in the test suite: a change near the loss that moves a single bit shows there.
It must be run by each generation's interpreter (.venv and .venv-llava), on each kind of processor. A change that is
meant to move the figures records them again, and says why in its commit.

The runs go through the command line's own entry point and touch nothing but the public trainer class, so that the
insides may move.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]  # tiny.py, and the miniature that it uses
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
OWN = HERE / f"transformers-{transformers.__version__}-{torch.backends.cpu.get_cpu_capability()}.json"
#: A processor for which nothing is pinned has to be close to this one.
FILE = OWN if OWN.is_file() else HERE / f"transformers-{transformers.__version__}-AVX512.json"

#: The stage, and what differs from `base`. `from` names the run whose checkpoint it starts from.
RUNS: dict[str, dict] = {
    "teacher-pt": {"stage": "pt", "student": "qwen-teacher", "projector": "mlp2x_gelu"},
    "teacher-sft": {"stage": "sft", "student": "qwen-teacher", "projector": "mlp2x_gelu", "adapter": "teacher-pt"},
    "dpt": {"stage": "dpt"},
    "dpt-accumulated": {"stage": "dpt", "batch": 1, "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
    "dft": {"stage": "dft", "adapter": "dpt"},
    "dft-without-taf": {"stage": "dft", "projector": "mlp2x_gelu", "mixed": True},
    "dft-without-vat": {"stage": "dft", "adapter": "dpt", "vat": False, "mixed": True, "measure_attention": True},
    "dft-accumulated": {
        "stage": "dft", "adapter": "dpt", "mixed": True, "batch": 1, "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
    },
    "dft-lora": {
        "stage": "dft", "adapter": "dpt", "mixed": True, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.1,
    },
    "dft-options": {
        "stage": "dft", "adapter": "dpt", "mixed": True, "attention_loss": "mse", "attention_rows": "text",
        "layer_matching": "simple", "kd_temperature": 2.0, "lm_weight": 0.5, "kl_weight": 2.0,
        "attention_weight": 3.0, "attention_map_impl": "eager", "group_by_modality_length": True,
    },
    "dft-kl-matrix": {
        "stage": "dft", "adapter": "dpt", "attention_loss": "cosine", "attention_similarity": "matrix",
        "attention_rows": "answer", "shuffle_attention_targets": True, "batch": 4,
    },
    "dft-bf16": {"stage": "dft", "adapter": "dpt", "mixed": True, "bf16": True},
    "sft": {"stage": "sft", "from": "dft", "mixed": True},
    "sft-lora": {"stage": "sft", "from": "dft-lora", "mixed": True, "lora_enable": True, "lora_r": 4},
    "dft-two-ranks": {"stage": "dft", "adapter": "dpt", "mixed": True, "ranks": 2},
    "dft-lora-two-ranks": {
        "stage": "dft", "adapter": "dpt", "mixed": True, "ranks": 2, "lora_enable": True, "lora_r": 4,
        "gradient_accumulation_steps": 2,
    },
}  # fmt: skip


def environment() -> dict[str, str]:
    """What the last bits depend on beside the code."""
    names = ("model name", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith(names)), platform.machine())
    except OSError:
        cpu = platform.machine()
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class Pins:
    """Collects a run's figures as exact hexadecimal numbers."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.norms: list[str] = []
        self.terms: list[dict[str, float]] = []

    def watch(self):
        """Record the losses of all micro-batches and the gradient norm of each step, until `remove()` is called."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        from llava_compodistill import CompoDistillTrainer

        original = CompoDistillTrainer.training_step

        def training_step(trainer, *args, **kwargs):
            loss = original(trainer, *args, **kwargs)
            self.losses.append(float(loss).hex())
            return loss

        def before_step(optimizer, args, kwargs):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(sum(float(grad.double().square().sum()) for grad in grads).hex())

        CompoDistillTrainer.training_step = training_step
        handle = register_optimizer_step_pre_hook(before_step)

        def remove() -> None:
            CompoDistillTrainer.training_step = original
            handle.remove()

        return remove

    def figures(self, trainer) -> dict:
        names = ("lm", "kl", "attention", "attention_similarity")
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": self.losses,
            "squared_gradient_norms": self.norms,
            "terms": [{name: entry[name] for name in names if name in entry} for entry in logged],
            "weights": digest(trainer.model),
        }


def digest(model) -> str:
    """A hash of the trained weights, the wrapper's names left out."""
    found = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if value.requires_grad:
            found.update(name.removeprefix("module.").encode())
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


class World:
    """The tiny world of the tests, with a teacher whose attention is far from uniform."""

    def __init__(self, root: Path):
        import tiny

        self.root = root
        self.paths = tiny.make_world(root / "world")
        images = sorted((self.paths["data"] / "images").rglob("*.png"))
        names = [str(path.relative_to(self.paths["data"] / "images")) for path in images]
        samples = [tiny.sample(number, names[number] if number % 4 else None, 1 + number % 3) for number in range(16)]
        (root / "mixed.json").write_text(json.dumps(samples))

    def output(self, name: str) -> Path:
        return self.root / f"llava-{name}"

    def sharpen(self) -> None:
        from safetensors.torch import load_file, save_file

        path = self.root / "llava-teacher"
        shutil.copytree(self.output("teacher-sft"), path)
        weights = load_file(path / "model.safetensors")
        for name, weight in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weights[name] = weight * 0.25 / weight.std()
            elif "mm_projector" in name and name.endswith("weight"):
                weights[name] = weight * 0.3 / weight.std()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    def flags(self, name: str) -> list[str]:
        import tiny

        options = dict(RUNS[name])
        stage, ranks = options.pop("stage"), options.pop("ranks", 1)
        values: dict[str, object] = {
            "model_name_or_path": self.paths[options.pop("student", "qwen-student")],
            "mm_projector_type": options.pop("projector", "taf"),
            "per_device_train_batch_size": options.pop("batch", 2),
            "max_steps": 3,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "seed": 3,
        }
        if options.pop("mixed", False):
            values["data_path"] = self.root / "mixed.json"
        if "adapter" in options:
            values["pretrain_mm_mlp_adapter"] = self.output(options.pop("adapter")) / "mm_projector.bin"
        if "from" in options:
            values["model_name_or_path"] = self.output(options.pop("from"))
        if stage in ("dpt", "dft"):
            values["teacher_model_path"] = self.root / "llava-teacher"
        if stage == "dft":
            values |= {"student_layers": "1,2,3", "teacher_layers": "1,2,3,4"}
        if ranks > 1:
            values["ddp_backend"] = "gloo"
        return tiny.flags(self.paths, stage, self.output(name), **values, **options)


def record(root: Path, only: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Run everything in order; (name, figures) of each."""
    world = World(root)
    for name, options in RUNS.items():
        if only is not None and name not in only:
            continue
        figures = root / f"{name}.json"
        if options.get("ranks", 1) == 1:
            run_here(world.flags(name), figures)
        else:
            run_ranks(world.flags(name), figures, options["ranks"])
        if name == "teacher-sft":
            world.sharpen()
        yield name, json.loads(figures.read_text())


def run_here(flags: list[str], figures: Path) -> None:
    from llava_compodistill import train

    pins = Pins()
    remove = pins.watch()
    try:
        trainer = train.main(flags)
    finally:
        remove()
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # left behind by transformers 4.37
    if int(os.environ.get("RANK", 0)) == 0:
        figures.write_text(json.dumps(pins.figures(trainer), indent=1))


def run_ranks(flags: list[str], figures: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(Path(__file__).resolve()), "--rank-of", str(figures), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-6000:])


def differences(found: dict, pinned: dict, exact: bool) -> list[str]:
    """Where a run is not as it was written down; without `exact`, beyond the rounding of another machine."""
    apart = []
    for name in ("losses", "squared_gradient_norms"):
        ours, theirs = ([float.fromhex(value) for value in run[name]] for run in (found, pinned))
        same = ours == theirs if exact else _close(ours, theirs)
        if not same:
            apart.append(f"{name} {ours}, not {theirs}")
    for ours, theirs in zip(found["terms"], pinned["terms"], strict=True):
        same = ours == theirs if exact else ours.keys() == theirs.keys() and _close(ours.values(), theirs.values())
        if not same:
            apart.append(f"terms {ours}, not {theirs}")
    if exact and found["weights"] != pinned["weights"]:
        apart.append("the final weights")
    return apart


def _close(ours, theirs) -> bool:
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        abs(a - b) <= 2e-3 * max(abs(b), 1e-2) for a, b in zip(ours, theirs, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pinned = json.loads(FILE.read_text()) if args.check else None
    runs, failed = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, figures in record(Path(folder)):
            runs[name] = figures
            if pinned is None:
                print(f"{name}: {figures['terms'][-1]}", flush=True)
                continue
            apart = differences(figures, pinned["runs"][name], pinned["environment"] == environment())
            failed += bool(apart)
            print(f"{name}: {'; '.join(apart) if apart else 'as pinned'}", flush=True)
    if pinned is None:
        OWN.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")
        print(OWN)
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        run_here(sys.argv[3:], Path(sys.argv[2]))
        from llava_compodistill.train.run import end_processes

        end_processes()
    else:
        sys.exit(main())
