"""The matrix of versions: what it installs, how it judges, and that the READMEs show what ran."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from versions import run as versions

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.once


def test_pins_are_those_of_the_two_commands():
    text = (ROOT / "scripts" / "setup_env.sh").read_text()
    for generation, name in versions.GENERATIONS.items():
        written = re.search(rf"^{name}=\((.+)\)$", text, re.MULTILINE).group(1).split()
        llava, *pins = versions.pins(generation)
        assert pins == written and llava.startswith("llava-torch==")


def test_the_oldest_torch_and_the_last_of_each_later_one():
    assert versions.ascending(["2.1.0", "2.1.2", "2.2.0", "2.10.0", "2.10.1"]) == ["2.1.2", "2.2.0", "2.10.1"]


def test_releases_come_from_pip_between_the_lower_bound_and_what_it_would_install(monkeypatch):
    printed = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1, 2.9.0, 2.1.0, 2.0.1, 1.13.1\n"

    def run(command, **kwargs):
        report = json.dumps({"install": [{"metadata": {"version": "2.14.1"}}]})
        return subprocess.CompletedProcess(command, 0, report if "--report" in command else printed, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert versions.torch_releases("python") == ["2.1.0", "2.9.0", "2.14.1"]


def test_this_python_is_found():
    name = "{}.{}".format(*sys.version_info)
    found = versions.find_python(name)
    assert found is None or subprocess.check_output([found, "--version"], text=True).startswith(f"Python {name}.")
    assert versions.find_python("3.99") is None


@pytest.mark.parametrize("code, outcome", [("assert True", "passed"), ("assert False, 'broken'", "failed")])
def test_an_environment_is_judged_by_its_tests(monkeypatch, tmp_path, code, outcome):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"def test_it():\n    {code}\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "TESTS", ("test_it",))
    cell = versions.Cell("3.11", "current", "2.13.0", "5.18.0")
    versions.run_tests(cell, Path(sys.prefix), tmp_path, all_tests=False)
    assert cell.outcome == outcome and f"1 {outcome}" in cell.tests
    assert (outcome == "failed") == ("test_it.py::test_it" in cell.why)


def test_what_pip_refuses_is_named(monkeypatch, tmp_path):
    asked = []

    def run(command, **kwargs):
        asked.append(command)
        failed = "torch==9" in command
        text = "WARNING: old\nERROR: No matching distribution found for torch==9\n" if failed else ""
        return subprocess.CompletedProcess(command, int(failed), "", text)

    monkeypatch.setattr(versions, "pins", lambda generation: ["llava-torch==1", "transformers==1"])
    monkeypatch.setattr(subprocess, "run", run)
    wheel = tmp_path / "ours.whl"
    cell = versions.Cell("3.11", "current", "9", "5.18.0")
    assert versions.install(cell, "python", wheel, tmp_path) == "No matching distribution found for torch==9"
    for python in ("3.13", "3.14"):  # the second is not allowed by setup.py
        asked.clear()
        assert versions.install(versions.Cell(python, "current", "2.5.0", "5.18.0"), "python", wheel, tmp_path) == ""
        assert any("--ignore-requires-python" in command for command in asked) == (python == "3.14")


def test_the_tables_show_what_ran():
    cells = versions.read(versions.RESULTS)
    assert cells, "nothing has run"
    text = (ROOT / "scripts" / "versions" / "README.md").read_text()
    shown = re.findall(r"^\| (3\.\d+) \| (\S+) \| (\S+) \| (.+) \|$", text, re.MULTILINE)
    assert shown == list(versions.rows(cells))
    assert all(cell.transformers == cell.versions.get("transformers", cell.transformers) for cell in cells.values())
    assert json.loads(versions.RESULTS.read_text())["cells"] == [versions.asdict(cell) for cell in cells.values()]
