"""The harness of injected faults (scripts/faults) in short: it runs, and finds what is put before it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

FAULTS = Path(__file__).resolve().parents[1] / "scripts" / "faults"
sys.path.append(str(FAULTS))

import cases  # noqa: E402

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) on this machine")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FAULTS / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=tiny.environment(), timeout=300)


@compiler
def test_nothing_is_lost_in_a_short_run(tmp_path):
    """20 kills, 5 full disks, a few hundred files that are not what they should be."""
    report = tmp_path / "faults.json"
    done = run("--suite", "kills,disks,fuzz", "--cases", "kills=20,disks=5,fuzz=320", "--jobs", 1, "--output", report)
    assert report.is_file(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    lost = [
        f"{case['case']}: {case['outcome']}: {case['detail']}"
        for case in found["cases"]
        if case["outcome"] not in cases.HELD
    ]
    assert done.returncode == 0 and not lost, "\n".join(lost)
    assert found["injected"] == 345
