"""Several processes, with and without DeepSpeed, give the losses and weights of one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, trained_weights
from safetensors.torch import load_file

from llava_compodistill.train import manifest, pickles, resume
from scale import modes

pytestmark = pytest.mark.invariant


def torchrun(script, flags) -> subprocess.CompletedProcess:
    """Two processes of a script, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), *flags]
    return subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=240)


def parallel_flags(world, teacher, mixed, output, **changes):
    values = {
        **PLAIN,
        "teacher_model_path": teacher,
        "mm_projector_type": "mlp2x_gelu",
        "data_path": mixed,
        "student_layers": "1,2,3",
        "teacher_layers": "1,2,3,4",
        "max_steps": 3,
        "sight_steps": 1,  # which every way of wrapping the student has to bear
        **changes,
    }
    return tiny.flags(world, "dft", output, **values)


#: A run in which one rank gets a signal.
STOPPED = """
import os, runpy, signal
from llava_compodistill.train.trainer import CompoDistillTrainer
step = CompoDistillTrainer.training_step

def signalled(self, *args, **kwargs):
    if self.args.process_index == 1 and self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self, *args, **kwargs)

CompoDistillTrainer.training_step = signalled
runpy.run_module("llava_compodistill.train", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(ranks, dft, world, sharp_teacher, mixed, tmp_path):
    # Into the second epoch, whose order both have to draw alike.
    single, expected = dft("one", max_steps=6, gradient_accumulation_steps=2, **PLAIN)
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", ddp_backend="gloo", max_steps=6)
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = torchrun(tmp_path / "stopped.py", flags)
    output = done.stdout + done.stderr
    assert done.returncode, output[-6000:]
    assert output.count("Stopped by SIGUSR1 after step 5 of 6 (exit status 75)") == 1
    assert "exitcode  : 75" in output  # of one rank at least: torchrun ends the others, which may be about to end
    assert resume.damage(tmp_path / "two" / "checkpoint-5") is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest.names_in(tmp_path / "two" / "checkpoint-5")
    ranks.train_well(flags, 2, tmp_path / "log")
    log = tiny.read_log(tmp_path / "two")
    assert all(abs(entry["sight"]) < 1 for entry in log)
    assert_same_log(log, expected, 2e-5)
    weights = load_file(tmp_path / "two" / "model.safetensors")
    names = {name: p for name, p in trained_weights(single.model).items()}
    assert_same_weights({name: weights[name] for name in names}, names, 1e-5)


#: Tells that DeepSpeed is there.
ENGINE = """
initialize = deepspeed.initialize
deepspeed.initialize = lambda *args, **kwargs: print("ENGINE", flush=True) or initialize(*args, **kwargs)
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage, kind", [pytest.param(2, "full", marks=pytest.mark.once), (3, "lora")])
@pytest.mark.long
def test_deepspeed_gives_the_losses_of_one_process(
    ranks, dft, world, dpt_path, sharp_teacher, mixed, tmp_path, stage, kind
):
    options = {"pretrain_mm_mlp_adapter": dpt_path / "mm_projector.bin", "mm_projector_type": "taf"}
    if (
        kind == "lora"
    ):  # whose A starts from random numbers, and ZeRO-3 draws others: B = 0 hides them in the first step
        options |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "learning_rate": 0}
    options = {**PLAIN, **options, "save_strategy": "steps", "save_steps": 2}
    single, expected = dft("one", max_steps=3, gradient_accumulation_steps=2, **options)
    mode = f"zero{stage}"
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", **{**options, **modes.flags(mode, tmp_path)})
    done = ranks.train(flags, 2, tmp_path / "log", modes.prelude(mode) + ENGINE)
    assert done.ok, done.text[-6000:]
    assert done.text.count("ENGINE") == 2, "DeepSpeed was not used"
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-4)
    folder = tmp_path / "two" / "checkpoint-2"
    assert any(name.startswith("global_step2/") for name in manifest.names_in(folder))
    assert resume.damage(folder) is None
    pickles.refuse_unknown(folder, trusted=False)  # DeepSpeed's own are known
    assert all(("sight" in entry) == (stage == 2) for entry in tiny.read_log(tmp_path / "two"))
    if kind == "full":
        saved = load_file(tmp_path / "two" / "model.safetensors")
    else:
        saved = torch.load(tmp_path / "two" / "non_lora_trainables.bin")
        assert len(load_file(tmp_path / "two" / "adapter_model.safetensors")) == 4 * 7 * 2
    expected = {
        n: p for n, p in single.model.named_parameters() if "mm_projector" in n or n.startswith("model.layers")
    }
    assert_same_weights({name: saved[name] for name in expected}, expected, 1e-4)
