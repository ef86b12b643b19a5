"""Nothing in a checkpoint runs when training goes on from it."""

from __future__ import annotations

import os
import pickle
import random
import zipfile

import numpy
import pytest
import torch

from llava_compodistill import compat
from llava_compodistill.errors import CheckpointError
from llava_compodistill.train import pickles

pytestmark = pytest.mark.invariant


class Payload:
    """Leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path):
    """A trainer's state as it is saved."""
    path = tmp_path / "checkpoint-5"
    (path / "global_step5").mkdir(parents=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save(scheduler.state_dict(), path / "scheduler.pt")
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(state, path / "rng_state.pth")
    tensors = {"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.ones(1)), "c": torch.float16}
    torch.save({**tensors, "d": {1, 2}, "e": torch.Size([1])}, path / "global_step5" / "rank_0_states.pt")
    return path


def test_a_trainers_own_state_is_known(folder, caplog):
    pickles.refuse_unknown(folder, trusted=False)
    assert not caplog.text
    assert "numpy ndarray" in pickles.globals_of(folder / "rng_state.pth")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_3.pth", "global_step5/rank_0_states.pt"])
def test_code_in_a_file_is_named_before_it_is_loaded(folder, tmp_path, caplog, name):
    torch.save({"state": Payload(tmp_path / "ran")}, folder / name)
    with pytest.raises(CheckpointError, match=rf"(?s)would run code.*{name}: posix mkdir\n.*--trust_checkpoint True"):
        pickles.refuse_unknown(folder, trusted=False)
    pickles.refuse_unknown(folder, trusted=True)
    assert "is trusted" in caplog.text and f"{name}: posix mkdir" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_all_that_is_imported_is_listed(folder):
    torch.save([Payload("x"), pickles.refuse_unknown], folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="llava_compodistill.train.pickles refuse_unknown, posix mkdir"):
        pickles.refuse_unknown(folder, trusted=False)


def write_archive(path, *records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: torch.save(Payload("x"), path, pickle_protocol=4), r"\[STACK_GLOBAL\]"),
        (lambda path: torch.save(Payload("x"), path, _use_new_zipfile_serialization=False), "another format"),
        (lambda path: path.write_bytes(pickle.dumps(Payload("x"))), "another format"),
        (lambda path: write_archive(path, ("a/data.pkl", b"."), ("b/data.pkl", b".")), "another format"),
        (lambda path: write_archive(path, ("a/data.pkl", b"N."), ("a/constants.pkl", b"N.")), "another format"),
        (lambda path: write_archive(path, ("a/data.pkl", b"N."), ("a/data.pkl", b"N.")), "there twice"),
        (lambda path: write_archive(path, ("a/data.pkl", b"cposix\n")), "is no pickle"),
        (lambda path: write_archive(path, ("a/data.pkl", b"\x82\x01.")), r"\[EXT1\]"),
    ],
)
def test_what_cannot_be_looked_through_is_refused(folder, write, message):
    (folder / "optimizer.pt").unlink()
    write(folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        pickles.refuse_unknown(folder, trusted=False)


def test_a_link_to_another_folder_is_refused(folder, tmp_path):
    """DeepSpeed would follow it."""
    (tmp_path / "elsewhere").mkdir()
    (folder / "global_step6").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"global_step6: \[a link to another folder\]"):
        pickles.refuse_unknown(folder, trusted=False)


def test_torch_runs_nothing_where_it_would_by_default(folder, tmp_path, monkeypatch):
    """As torch before 2.6 does, with transformers 4.37."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Payload(tmp_path / "ran"), tmp_path / "state.pt")
    with pickles.loads_tensors_alone(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()
    with compat.reads_own_rng_state() as can, pickles.loads_tensors_alone():
        assert can and torch.load(folder / "rng_state.pth")["numpy"][0] == "MT19937"
    torch.load(tmp_path / "state.pt")
    assert (tmp_path / "ran").exists(), "the test itself"
