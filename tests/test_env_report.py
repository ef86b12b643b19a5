"""`llava-compodistill env`: it reports, whatever is absent or broken."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
import transformers

from llava_compodistill import __version__, cli
from llava_compodistill.cli import env_report


def rows() -> dict[str, env_report.Row]:
    return {row.name: row for row in env_report.collect()}


def test_versions_are_those_that_are_imported():
    report = rows()
    assert report["llava_compodistill"].version == __version__
    assert report["torch"].version == torch.__version__
    assert report["transformers"].version == transformers.__version__
    assert report["llava"].version == "1.2.2.post1"
    assert "not patched" in report["llava"].detail


def test_json_and_text_hold_every_row(capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {row.name for row in env_report.collect()}
    assert report["transformers"]["version"] == transformers.__version__
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and all(name in text for name in report)


def test_an_absent_package_says_what_it_would_give_and_how_to_get_it(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    report = rows()
    for name in (*env_report.REQUIRED, *env_report.OPTIONAL):
        assert report[name].version is None
        assert "pip install" in report[name].detail or name == "triton"


def test_broken_parts_are_reported_and_not_raised(monkeypatch):
    def damaged(name):
        raise ValueError("damaged METADATA")

    def no_torch(name, *args):
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(importlib.metadata, "version", damaged)
    monkeypatch.setattr(importlib, "import_module", no_torch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = rows()
    assert "libcudart" in report["torch"].detail
    assert "damaged METADATA" in report["peft"].detail
    assert "llava-torch==1.2.2.post1" in report["llava"].detail


def test_a_checkout_is_recognised_with_its_patch(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("__compodistill_patch__ = 1\n")
    (tmp_path / "pyproject.toml").write_text('version = "1.2.2.post1"\n')
    command = [sys.executable, "-m", "llava_compodistill.cli", "env", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    llava = json.loads(result.stdout)["llava"]
    assert llava["version"] == "1.2.2.post1"
    assert str(tmp_path) in llava["detail"] and llava["detail"].endswith(", patched")


def test_the_table_is_drawn_for_a_terminal(capsys):
    env_report._print_table(env_report.collect())
    assert "transformers" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_llava():
    code = (
        "import sys; from llava_compodistill import cli; status = cli.main([]);"
        "print(sorted({'torch', 'transformers', 'llava'} & set(sys.modules)), status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] 2"


def test_every_command_is_in_the_help():
    text = cli.build_parser().format_help()
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in text and command.help in text


@pytest.mark.parametrize("name", ["plan", "cache", "check", "eval", "reproduce", "merge", "init", "env"])
def test_the_help_of_a_command_is_printed(name, capsys):
    """argparse formats help texts when they are asked for: a lone % fails there and nowhere else."""
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "--help" in capsys.readouterr().out


def test_a_peft_that_does_not_fit_is_shown(monkeypatch):
    assert rows()["peft"].detail == ""
    original = importlib.import_module

    def broken(name):
        if name == "peft":
            raise ImportError("cannot import name 'clear_device_cache'")
        return original(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert rows()["peft"].detail.startswith("cannot be imported beside these versions: cannot import name 'clear_")
