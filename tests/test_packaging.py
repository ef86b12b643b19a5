"""The installed package: what it holds, and that it is the one under test."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llava_compodistill
from llava_compodistill import about

PACKAGE = Path(llava_compodistill.__file__).resolve().parent
SOURCE = Path(os.environ.get("COMPODISTILL_SOURCE") or Path(__file__).resolve().parent.parent)

#: Folders of scripts/ that are run from a checkout and are not in the wheel.
CHECKOUT_ONLY = ("benchmark", "faults", "miniature", "scale", "versions")

installed = pytest.mark.skipif("COMPODISTILL_SOURCE" not in os.environ, reason="scripts/test.sh installs the wheel")


@installed
def test_the_tests_run_against_the_installed_wheel():
    assert PACKAGE != SOURCE / "llava_compodistill", "the sources are on sys.path: tests/ must not be a package"
    assert "site-packages" in PACKAGE.parts


@installed
def test_the_wheel_holds_every_module_script_and_patch_of_the_sources():
    for folder, target in (("llava_compodistill", PACKAGE), ("scripts", PACKAGE / "scripts"), ("patches", None)):
        target = target or PACKAGE / folder
        for path in (SOURCE / folder).rglob("*"):
            if folder == "scripts" and path.relative_to(SOURCE / folder).parts[0] in CHECKOUT_ONLY:
                continue
            if path.suffix in (".py", ".sh", ".json", ".patch"):
                copy = target / path.relative_to(SOURCE / folder)
                assert copy.is_file(), f"{path} is not in the wheel"
                assert copy.read_bytes() == path.read_bytes()


@installed
def test_the_console_command_and_the_version_are_installed():
    distribution = importlib.metadata.distribution("llava-compodistill")
    assert distribution.version == llava_compodistill.__version__
    command = Path(sys.executable).with_name("llava-compodistill")
    printed = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"llava-compodistill {llava_compodistill.__version__}"
    if (SOURCE / ".git").exists() and about.git_commit(SOURCE):
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", about.commit())


def test_requirements_leave_room_for_both_generations():
    text = (SOURCE / "setup.py").read_text()
    for trap in ("torchvision", "timm", "=="):
        assert trap not in text.split("EXTRAS = {")[0].split("REQUIRES = [")[1]


def test_resources_are_found_here():
    assert (about.folder("scripts") / "launch.sh").is_file()
    assert list(about.folder("patches").glob("*.patch"))
    with pytest.raises(ValueError, match="scripts, patches"):
        about.folder("weights")


def test_resources_are_found_in_a_checkout_and_missed_with_a_clear_error(tmp_path, monkeypatch):
    package = tmp_path / "llava_compodistill"
    package.mkdir()
    monkeypatch.setattr(about, "_PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="incomplete"):
        about.folder("scripts")
    (tmp_path / "scripts").mkdir()
    with pytest.raises(FileNotFoundError):  # a neighbour of the same name in site-packages is not ours
        about.folder("scripts")
    (tmp_path / "setup.py").touch()
    assert about.folder("scripts") == tmp_path / "scripts"


@pytest.mark.slow
@pytest.mark.once
def test_an_editable_install_finds_the_folders(tmp_path):
    if not (SOURCE / "setup.py").is_file():
        pytest.skip("needs the sources")
    checkout = _copy_of_the_sources(tmp_path)
    target = tmp_path / "site"
    _pip("install", "--no-build-isolation", "--no-deps", "--target", target, "-e", checkout)
    code = f"import site; site.addsitedir({str(target)!r}); from llava_compodistill import about as r; "
    code += "print(r.folder('scripts')); print(r.folder('patches'))"
    # -I: neither this folder nor PYTHONPATH; the copy comes first because the path file adds a finder, so drop ours.
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; " + code
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(checkout / "scripts"), str(checkout / "patches")]


@pytest.mark.slow
@pytest.mark.once
def test_a_built_wheel_holds_the_folders_and_one_license(tmp_path):
    if not (SOURCE / "setup.py").is_file():
        pytest.skip("needs the sources")
    checkout = _copy_of_the_sources(tmp_path)
    _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path / "dist", checkout)
    (wheel,) = (tmp_path / "dist").glob("llava_compodistill-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in ("scripts/dft.sh", "scripts/zero2.json", "patches/llava-c121f04-plugin-hook.patch", "build_info.json"):
        assert f"llava_compodistill/{name}" in names
    for path in (checkout / "scripts" / "eval").glob("*.sh"):
        assert f"llava_compodistill/scripts/eval/{path.name}" in names
    assert not [
        name
        for name in names
        if any(f"{folder}/" in name for folder in CHECKOUT_ONLY) or name.endswith(".safetensors")
    ]
    assert wheel.stat().st_size < 1_000_000, "something large has got into the wheel"
    assert sum(name.endswith("LICENSE") for name in names) == 1
    assert not any(name.startswith(("tests/", "scripts/", "patches/", "build/")) for name in names)


def _copy_of_the_sources(tmp_path: Path) -> Path:
    import shutil

    target = tmp_path / "checkout"
    target.mkdir()
    for name in ("llava_compodistill", "scripts", "patches"):
        shutil.copytree(SOURCE / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (SOURCE / name).exists():
            shutil.copy(SOURCE / name, target / name)
    return target


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
