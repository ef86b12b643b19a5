"""A checkpoint is whole when its manifest, written last, says so."""

from __future__ import annotations

import errno
import os

import pytest

from llava_compodistill.train import manifest

pytestmark = [pytest.mark.invariant, pytest.mark.once]
END = manifest.END


@pytest.fixture
def folder(tmp_path):
    """A sealed checkpoint with files smaller and larger than two ends, and one in a subfolder."""
    path = tmp_path / "checkpoint-5"
    (path / "global_step5").mkdir(parents=True)
    for name, size in {"small.json": 10, "weights.safetensors": 5 * END, "global_step5/rank.pt": END + 1}.items():
        (path / name).write_bytes(bytes(1 + number % 250 for number in range(size)))
    manifest.seal(path)
    return path


def replace(path, start, new):
    with path.open("r+b") as file:
        file.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
        file.write(new)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: replace(path, path.stat().st_size, b"x"),
    "zeroed at its end": lambda path: replace(path, -4, bytes(4)),
    "zeroed at its begin": lambda path: replace(path, 0, bytes(4)),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("name", ["small.json", "weights.safetensors", "global_step5/rank.pt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_kill_or_a_power_cut_does_to_a_file_is_found_and_named(folder, name, damage):
    assert manifest.is_sealed(folder) and manifest.find_damage(folder) is None
    DAMAGES[damage](folder / name)
    assert manifest.find_damage(folder).startswith(f"{name} is {'missing' if damage == 'missing' else 'damaged'}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {}}}'])
def test_a_torn_manifest_is_a_damage_of_its_own(folder, text):
    (folder / manifest.MANIFEST_FILE).write_text(text)
    assert manifest.find_damage(folder).startswith("checkpoint_manifest.json is damaged")


def test_a_changed_bit_in_the_middle_is_found_by_whole_hashes_alone(folder):
    assert not manifest.has_whole_hashes(folder)
    manifest.seal(folder, whole=True)
    assert manifest.has_whole_hashes(folder) and manifest.find_damage(folder, whole=True) is None
    replace(folder / "weights.safetensors", 2 * END, b"\0")
    assert manifest.find_damage(folder) is None
    assert manifest.find_damage(folder, whole=True) == (
        "weights.safetensors is damaged (its SHA-256 is not what was saved)"
    )


def test_all_is_on_the_disk_before_the_manifest_has_its_name(folder, monkeypatch):
    events = []
    sync, rename = os.fsync, os.replace

    def fsync(handle):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), folder))
        sync(handle)

    def replace(source, target):
        events.append("RENAMED")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    manifest.seal(folder)
    renamed = events.index("RENAMED")
    before, after = events[:renamed], events[renamed + 1 :]
    files = ["small.json", "weights.safetensors", "global_step5/rank.pt"]
    assert set(before) == {*files, "global_step5", ".", "..", "checkpoint_manifest.json.tmp"}
    assert before[-1] == "checkpoint_manifest.json.tmp" and after == ["."]
    assert max(map(before.index, files)) < before.index("global_step5") < before.index(".")


def test_a_kill_while_sealing_leaves_no_seal(folder, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.seal(folder)
    assert not manifest.is_sealed(folder), "the old one is of other files"


@pytest.mark.parametrize("number, seals", [(errno.EINVAL, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_file_system_that_cannot_sync_is_no_fault_and_a_broken_disk_is(folder, monkeypatch, number, seals):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if seals:
        manifest.seal(folder)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            manifest.seal(folder)
    assert manifest.is_sealed(folder) == seals
