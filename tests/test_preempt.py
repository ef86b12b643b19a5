"""Signals end a run after its step, with a checkpoint that goes on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import assert_same_log, assert_same_weights, trained_weights

from llava_compodistill.errors import FlagError
from llava_compodistill.train import manifest, preempt, run
from llava_compodistill.train.trainer import CompoDistillTrainer

pytestmark = pytest.mark.invariant
SIGNALS = tuple(preempt.EXIT_STATUS)


@pytest.fixture
def signalled(monkeypatch):
    """Send this process a signal inside the first micro-batch of a step."""

    def at(step, number):
        original, sent = CompoDistillTrainer.training_step, []

        def training_step(self, *args, **kwargs):
            loss = original(self, *args, **kwargs)
            if self.state.global_step == step - 1 and not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return loss

        monkeypatch.setattr(CompoDistillTrainer, "training_step", training_step)

    return at


RUNS = {
    signal.SIGTERM: {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 12},
    signal.SIGUSR1: {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "max_steps": 6, "save_only_model": True},
    signal.SIGINT: {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
}


@pytest.mark.parametrize("number", RUNS)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(dft, tmp_path, monkeypatch, signalled, caplog, number):
    options, before = RUNS[number], [signal.getsignal(each) for each in SIGNALS]
    unbroken, expected = dft("unbroken", **options)
    last = options["max_steps"]
    at = last - 1
    signalled(at, number)
    with pytest.raises(preempt.Preempted) as stopped:
        dft("stopped", **options)
    assert stopped.value.code == (130 if number == signal.SIGINT else 75)
    assert f"Stopped by {number.name} after step {at} of {last}" in caplog.text
    folder = tmp_path / "stopped"
    assert [path.name for path in folder.iterdir()] == [f"checkpoint-{at}"], "no result, no lock, no older checkpoint"
    checkpoint = folder / f"checkpoint-{at}"
    assert manifest.is_sealed(checkpoint) and (checkpoint / "optimizer.pt").exists()
    assert [signal.getsignal(each) for each in SIGNALS] == before
    monkeypatch.undo()
    resumed, found = dft("stopped", **options)
    assert_same_log(found, expected, 0)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 0)


def test_a_signal_in_the_last_step_leaves_a_checkpoint_and_the_result(dft, tmp_path, signalled):
    signalled(2, signal.SIGTERM)
    trainer, _ = dft(max_steps=2)
    assert trainer.state.global_step == 2 and (tmp_path / "dft" / "model.safetensors").exists()
    assert manifest.is_sealed(tmp_path / "dft" / "checkpoint-2")


def test_before_the_first_step_a_signal_has_its_usual_effect(world, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def build_student(*args):
        raise Seen([signal.getsignal(each) for each in SIGNALS])

    monkeypatch.setattr(run, "build_student", build_student)
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Seen) as seen:
        tiny.run(world, "pt", tmp_path / "out", mm_projector_type="mlp2x_gelu")
    assert seen.value.args[0] == before


# ---------------------------------------------------------------------------------------------------------------------
# Signals that come again
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def stop(monkeypatch):
    """A callback that is on, over handlers that write down what reaches them."""
    reached: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: reached.append(got)) for number in SIGNALS}
    callback = preempt.StopOnSignal()
    callback.reached = reached
    callback.on_train_begin(None, None, None)
    yield callback
    callback.restore()
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def requested(callback):
    control = SimpleNamespace(should_save=False)
    callback.on_step_end(None, None, control)
    return callback.stopped_by if control.should_save else None


@pytest.mark.parametrize(
    "first, second",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGUSR1, signal.SIGINT),
    ],
)
def test_a_second_signal_has_its_usual_effect(stop, monkeypatch, capfd, first, second):
    monkeypatch.setattr(preempt, "PASSED_ON", 0.0)
    assert requested(stop) is None
    send(first)
    assert stop.reached == [] and requested(stop) == first
    assert f"{first.name}: this step is finished and saved" in capfd.readouterr().err
    send(second)
    assert stop.reached == [second]


def test_what_a_launcher_passes_on_is_no_second_signal(stop):
    """torchrun and deepspeed send SIGTERM to their ranks, which a scheduler has sent it already."""
    send(signal.SIGTERM, signal.SIGTERM)
    assert stop.reached == [] and requested(stop) == signal.SIGTERM


def test_a_warning_is_not_the_end(stop, monkeypatch):
    """Slurm sends SIGUSR1 and, when the time is over, SIGTERM: until it kills, there is time to save."""
    monkeypatch.setattr(preempt, "PASSED_ON", 0.0)
    send(signal.SIGUSR1, signal.SIGTERM)
    assert stop.reached == [] and requested(stop) == signal.SIGTERM


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    callback = preempt.StopOnSignal()
    callback.on_train_begin(None, None, None)
    found = [requested(callback)]
    if rank == 1:
        send(signal.SIGUSR1)
    found.append(requested(callback))
    (folder / str(rank)).write_text(" ".join(str(each and each.name) for each in found))
    torch.distributed.barrier()
    os._exit(0)


def test_ranks_stop_in_the_same_step(tmp_path):
    ranks = [multiprocessing.get_context("fork").Process(target=_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["None SIGUSR1"] * 2


class OwnProcess(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, place):
        return os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_that_load_data_outlast_a_signal_to_their_group(tmp_path):
    first = []
    loader = torch.utils.data.DataLoader(
        OwnProcess(), batch_size=1, num_workers=1, prefetch_factor=1, worker_init_fn=preempt.Shielded(first.append)
    )
    batches = iter(loader)
    worker = int(next(batches))
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)  # from another process than its parent
        time.sleep(0.05)
    assert {int(next(batches)) for _ in range(5)} == {worker}
    os.kill(worker, signal.SIGTERM)  # from its parent, as PyTorch does
    ended = time.monotonic() + 10
    while time.monotonic() < ended and batches._workers[0].is_alive():
        time.sleep(0.02)
    assert not batches._workers[0].is_alive()


def test_the_trainers_workers_are_shielded_and_still_seeded(dft):
    trainer, _ = dft(max_steps=1)
    shield = trainer.get_train_dataloader().worker_init_fn
    assert isinstance(shield, preempt.Shielded) and shield.first is not None


# ---------------------------------------------------------------------------------------------------------------------
# A process and its exit status
# ---------------------------------------------------------------------------------------------------------------------
def test_a_process_ends_as_the_console_command_does(world, tmp_path, capsys, monkeypatch):
    """An error that explains itself is said once, without a traceback."""
    flags = tiny.flags(world, "dft", tmp_path / "out", teacher_model_path=None)
    assert run.run_process(flags) == 2
    printed = capsys.readouterr().err
    assert printed.count("llava_compodistill.train: error: --stage dft distils from a teacher") == 1
    assert "Traceback" not in printed and not (tmp_path / "out").exists()
    assert run.run_process([*flags, "--no_such_flag"]) == 2
    assert "--no_such_flag" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(run, "LAUNCHER_NOTICES", 0.2)
    begun = time.monotonic()
    assert run.run_process(flags) == 2 and time.monotonic() - begun >= 0.2
    assert "error (rank 3): --stage dft" in capsys.readouterr().err


def test_a_process_that_was_stopped_tells_it_by_its_status(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPODISTILL_STATUS", str(tmp_path / "status"))
    for error, status in ((preempt.Preempted(75), 75), (KeyboardInterrupt(), 130), (FlagError("--a"), 2)):

        def main(argv, error=error):
            raise error

        monkeypatch.setattr(run, "main", main)
        assert run.run_process([]) == status
        assert (tmp_path / "status").read_text() == f"{status}\n"
