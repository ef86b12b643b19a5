"""Seeded runs of every stage are what they were when they were written down, to the last bit (tests/pinned)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "pinned"
spec = importlib.util.spec_from_file_location("pinned_record", HERE / "record.py")
pinned = importlib.util.module_from_spec(spec)
sys.modules["pinned_record"] = pinned
spec.loader.exec_module(pinned)

pytestmark = [pytest.mark.invariant, pytest.mark.slow]


@pytest.mark.skipif(not pinned.FILE.is_file(), reason=f"no runs are pinned for this transformers ({pinned.FILE.name})")
def test_the_pinned_runs_are_as_they_were(tmp_path):
    stored = json.loads(pinned.FILE.read_text())
    # Another processor or PyTorch rounds otherwise; there the figures have to be close.
    exact = stored["environment"] == pinned.environment()
    assert stored["runs"].keys() == pinned.RUNS.keys()
    apart = {}
    for name, figures in pinned.record(tmp_path):
        found = pinned.differences(figures, stored["runs"][name], exact)
        if found:
            apart[name] = found
    assert not apart, f"({'exact' if exact else 'within rounding'}) {json.dumps(apart, indent=1)}"
