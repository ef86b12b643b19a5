"""Where the miniature is started from: the command of the package, in and outside a checkout, and its own folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from llava_compodistill import about, cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The package as if it were imported from site-packages; returns the current folder, outside any checkout."""
    site = tmp_path / "site-packages"
    (site / "scripts").mkdir(parents=True)
    monkeypatch.setattr(about, "__file__", str(site / "llava_compodistill" / "about.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_outside_a_checkout_the_command_says_where_the_miniature_is(installed, capsys):
    assert cli.main(["miniature", "quickstart", "--smoke"]) == 2
    printed = capsys.readouterr().err
    assert "comes with the repository" in printed and f"{installed} is not inside a checkout" in printed
    assert "bash scripts/quickstart.sh" in printed


@pytest.mark.parametrize("folder", [".", "scripts/eval"])
def test_inside_a_checkout_the_command_runs_what_lies_there(installed, folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / folder)
    assert cli.main(["miniature", "benchmarks", str(installed / "nowhere"), str(installed / "bench")]) == 2
    assert "nowhere/manifest.json is missing" in capsys.readouterr().out


def test_the_package_of_a_checkout_finds_its_own_miniature(installed, monkeypatch, capsys):
    monkeypatch.setattr(about, "__file__", str(ROOT / "llava_compodistill" / "about.py"))
    assert cli.main(["miniature", "benchmarks", str(installed / "nowhere"), str(installed / "bench")]) == 2
    assert "nowhere/manifest.json is missing" in capsys.readouterr().out


def test_the_folder_is_a_command(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "miniature", "data", "world", "--preset", "smoke"]
    done = subprocess.run(command, env=tiny.environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "world" / "manifest.json").is_file()


def test_the_folder_without_the_package_says_how_to_get_it(tmp_path):
    # -E and -S: neither PYTHONPATH nor the environment's packages.
    command = [sys.executable, "-E", "-S", ROOT / "scripts" / "miniature", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "llava_compodistill is not installed" in done.stderr
    assert "scripts/quickstart.sh" in done.stderr and "Traceback" not in done.stderr
