"""The harness of injected faults (scripts/faults) in short, and whether it sees what it is there to see."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

FAULTS = Path(__file__).resolve().parents[1] / "scripts" / "faults"
sys.path.append(str(FAULTS))

import cases  # noqa: E402
import damages  # noqa: E402
import mutations  # noqa: E402
import shim  # noqa: E402

pytestmark = pytest.mark.once  # scripts/faults/run.py asks the same of the other generation
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC") or "cc") is None, reason="no C compiler (cc) on this machine"
)
KINDS = "dpt,dft,kill,disk,data,image,answers,records,checkpoint"


@needs_compiler
@pytest.mark.long
def test_nothing_is_lost_in_a_short_run(tmp_path):
    """12 kills, 3 full disks, some hundred files that are not what they should be."""
    report = tmp_path / "faults.json"
    counts = "kills=12,disks=3,init=4,fuzz=140"
    command = [sys.executable, str(FAULTS / "run.py"), "--suite", "kills,disks,init,fuzz", "--cases", counts]
    command += ["--kind", KINDS, "--jobs", "2", "--output", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny.environment(), timeout=400)
    assert report.is_file(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    outcomes = {case["case"]: case["outcome"] for case in found["cases"]}
    assert len(outcomes) == found["injected"] == 159
    lost = {name: outcome for name, outcome in outcomes.items() if outcome not in cases.HELD}
    assert not lost and done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The shim
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from shim import Shim
root = Path(sys.argv[2])
shim = Shim()
shim.watch(root, Path(sys.argv[3]))
eval(sys.argv[4])
with (root / "a.part").open("w") as file:
    file.write("0123456789")
    file.flush()
    if "sync" in sys.argv[4:]:
        os.fsync(file.fileno())
os.replace(root / "a.part", root / "a")
(root / "folder").mkdir()
print(shim.off())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.build(tmp_path_factory.mktemp("shim"))


def under(library, folder, does, *more):
    (folder / "root").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(FAULTS), str(folder / "root"), str(folder / "trace"), does, *more]
    return subprocess.run(command, capture_output=True, text=True, env=shim.environment(library))


def contents(folder):
    return {path.name: path.read_text() if path.is_file() else None for path in (folder / "root").iterdir()}


@needs_compiler
def test_every_operation_counts_and_only_below_the_folder(library, tmp_path):
    assert under(library, tmp_path, "None", "sync").returncode == 0
    kinds = [one.kind for one in shim.read_trace(tmp_path / "trace")]
    assert kinds == ["open", "write", "fsync", "close", "rename", "mkdir"]


@needs_compiler
@pytest.mark.parametrize(
    ("does", "left"),
    [
        ("shim.kill_at(2, 'before')", {"a.part": ""}),
        ("shim.kill_at(2, 'inside')", {"a.part": "01234"}),
        ("shim.kill_at(2, 'after')", {"a.part": "0123456789"}),
        ("shim.kill_at(4, 'before')", {"a.part": "0123456789"}),
        ("shim.kill_at(4, 'after')", {"a": "0123456789"}),
    ],
)
def test_a_kill_comes_at_its_operation(library, tmp_path, does, left):
    assert under(library, tmp_path, does).returncode == -9
    assert contents(tmp_path) == left


@needs_compiler
@pytest.mark.parametrize(
    ("does", "message", "left"),
    [
        ("shim.fail_from(1, 3, 28)", "No space left on device", {"a.part": "012"}),
        ("shim.fail_from(5, 0, 28)", "No space left on device", {"a": "0123456789"}),
        ("shim.fail_from(4, 0, 30)", "Read-only file system", {"a.part": "0123456789"}),
        ("shim.fail_from(2, 0, 5)", "Input/output error", {"a.part": ""}),
    ],
)
def test_a_disk_fails_from_its_operation_on(library, tmp_path, does, message, left):
    done = under(library, tmp_path, does)
    assert done.returncode == 1 and message in done.stderr
    assert contents(tmp_path) == left


@needs_compiler
@pytest.mark.parametrize(("more", "lost"), [((), ["a"]), (("sync",), [])])
def test_a_power_cut_takes_what_was_not_synced(library, tmp_path, more, lost):
    under(library, tmp_path, "None", *more)
    assert shim.lose_unsynced(shim.read_trace(tmp_path / "trace"), tmp_path / "root") == lost
    assert ((tmp_path / "root" / "a").read_bytes() == bytes(10)) is bool(lost)


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(shim.NoCompiler, match="no C compiler 'no-such-compiler'"):
        shim.build(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------
def test_a_case_is_made_again_by_its_name():
    assert cases.Case.parse("fuzz:data:7").name == "fuzz:data:7"
    records = json.dumps([{"id": number, "text": "a"} for number in range(9)]).encode()

    def made(seed):
        return mutations.of_file(records, "a.json", random.Random(seed)), mutations.image(random.Random(seed))

    assert made(3) == made(3)
    assert len({made(seed)[0][0] for seed in range(40)}) > 30, "they are different"


@pytest.mark.parametrize("seed", range(4))  # bare, and in an archive
def test_a_payload_would_run(tmp_path, seed):
    """Else a marker that is not there would prove nothing."""
    import torch

    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    path.write_bytes(damages.payload(marker, random.Random(seed)))
    with contextlib.suppress(RuntimeError):  # of a bare pickle, after it has run
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_bit_is_changed_where_it_was_asked_for(tmp_path):
    path = tmp_path / "a"
    places = set()
    for seed in range(200):
        path.write_bytes(bytes(100))
        damages.flip(path, random.Random(seed), end=10)
        (place,) = (number for number, byte in enumerate(path.read_bytes()) if byte)
        places.add(place)
    assert places == {*range(10), *range(90, 100)}
    for seed in range(200):
        path.write_bytes(bytes(100))
        damages.flip(path, random.Random(seed))
        places.update(number for number, byte in enumerate(path.read_bytes()) if byte)
    assert len(places) > 60


def test_a_brief_report_has_the_lost_cases_and_all_counts(tmp_path):
    some = [cases.Outcome(cases.Case("kills", "dft", n), "unequal" if n == 1 else "equal") for n in range(3)]
    for brief in (False, True):
        cases.write_report(tmp_path / "a.json", some, "run.py", 1.0, brief)
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["counts"] == {"kills": {"dft": {"equal": 2, "unequal": 1}}} and found["lost"] == 1
        assert [case["case"] for case in found["cases"]] == [f"kills:dft:{n}" for n in ((1,) if brief else range(3))]


def test_what_is_lost_is_counted_as_lost():
    case = cases.Case("kills", "dft", 1)
    assert all(cases.Outcome(case, outcome).held for outcome in ("equal", "refused clearly", "ok", "clear error"))
    for outcome in (
        "unequal",
        "torn",
        "refused",
        "raw exception",
        "nonsense",
        "hang",
        "code ran",
        "steps lost",
        "not noticed",
    ):
        assert not cases.Outcome(case, outcome).held
