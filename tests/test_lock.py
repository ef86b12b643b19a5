"""One run at a time in an output folder, which can be written to."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time

import pytest
import tiny

from llava_compodistill.errors import OutputError
from llava_compodistill.train import lock

pytestmark = [pytest.mark.invariant, pytest.mark.once]


def test_a_second_run_is_refused_with_the_place_of_the_first(tmp_path):
    output = tmp_path / "runs" / "out"
    with lock.locked(str(output)):
        name = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(OutputError, match=rf"--output_dir {output}: another run is writing to it \({name}\)"):
            with lock.locked(str(output)):
                pass
        with lock.locked(str(tmp_path / "other")):
            pass
        (output / "weights").touch()
    with lock.locked(str(output)):
        pass
    assert [path.name for path in output.iterdir()] == ["weights"], "the lock leaves nothing behind"
    assert not (tmp_path / "other").exists(), "nor does a run that wrote nothing"


def test_a_killed_run_holds_nothing(tmp_path):
    code = (
        "import sys, time\n"
        "from llava_compodistill.train import lock\n"
        "with lock.locked(sys.argv[1]):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=tiny.environment(), text=True
    )
    try:
        assert run.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"process {run.pid} on "), lock.locked(str(tmp_path)):
            pass
    finally:
        run.kill()
        run.wait()
    with lock.locked(str(tmp_path)):
        pass


def test_what_a_run_has_forked_does_not_hold_its_lock(tmp_path):
    """Workers that load data outlive a trainer that was killed by some seconds."""
    with lock.locked(str(tmp_path)):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with lock.locked(str(tmp_path)):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the run before may end."""
    flock, path = fcntl.flock, tmp_path / lock.LOCK_FILE

    def late(handle, how):
        if fcntl.flock is late:
            monkeypatch.setattr(fcntl, "flock", flock)
            path.unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.locked(str(tmp_path)), pytest.raises(OutputError), lock.locked(str(tmp_path)):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch, number):
    def failing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open" if number in (errno.EROFS, errno.EACCES) else "pwrite", failing)
    with pytest.raises(OutputError, match=rf"--output_dir .* cannot be written to \({os.strerror(number)}\)"):
        with lock.locked(str(tmp_path / "out")):
            pass


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match=f"--output_dir {path} cannot be written to"), lock.locked(str(path)):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, caplog, number):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.locked(str(tmp_path)):
        pass
    assert caplog.text.count("has no locks") == 1 and str(tmp_path) in caplog.text


def test_what_killed_runs_have_left_is_removed_and_named(tmp_path, caplog):
    left = ["tmp-checkpoint-4/model.safetensors", "checkpoint-2/checkpoint_manifest.json.tmp", ".tmpAb3xYz"]
    kept = ["checkpoint-2/model.safetensors", "tmp-checkpoint-mine/a", "notes.tmp", ".tmp", "runs/.tmpAb3xYz"]
    for name in [*left, *kept]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lock.remove_unfinished(str(tmp_path))
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in left if (tmp_path / name).exists()] == [] and not (tmp_path / "tmp-checkpoint-4").exists()
    assert caplog.text.count("Removed ") == 3
    assert all(name.split("/")[-1] in caplog.text for name in ("tmp-checkpoint-4", *left[1:]))


def test_a_run_takes_the_folder_before_it_loads_anything_and_clears_it(dft, tmp_path, monkeypatch):
    from llava_compodistill.train import run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    folder = tmp_path / "dft"
    torn = folder / "checkpoint-2" / ".tmpAb12Cd"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"a part of a model")
    with monkeypatch.context() as patched, lock.locked(str(folder)):
        patched.setattr(run, "load_teacher", loaded)
        patched.setattr(run, "build_student", loaded)
        with pytest.raises(OutputError, match=f"another run is writing to it .process {os.getpid()} on"):
            dft(max_steps=1)
    assert torn.exists()
    dft(max_steps=1)
    assert not torn.exists()
