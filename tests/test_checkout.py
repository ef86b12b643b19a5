"""`llava-compodistill init`: scripts and patches in LLaVA checkouts of both kinds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

from llava_compodistill import about, cli
from llava_compodistill.errors import CheckoutError
from llava_compodistill.hosts.llava import checkout, patching

HOOKED = Path("llava/__init__.py")
MODELS = Path("llava/model/__init__.py")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The registry's package, unpacked: llava/ and no scripts/."""
    root = tmp_path / "unpacked"
    source = Path(find_spec("llava").origin).parent
    shutil.copytree(source, root / "llava", ignore=shutil.ignore_patterns("__pycache__", "serve"))
    return root


@pytest.fixture
def clone(package: Path) -> Path:
    """A checkout as git clones it: pyproject.toml, and scripts of LLaVA's own."""
    (package / "pyproject.toml").write_text('[project]\nname = "llava"\nversion = "1.2.2.post1"\n')
    (package / "scripts").mkdir()
    for name in ("zero2.json", "zero3.json"):
        settings = json.loads((about.folder("scripts") / name).read_text())
        del settings["gradient_clipping"]  # all that LLaVA's own lack
        (package / "scripts" / name).write_text(json.dumps(settings, indent=4))
    (package / "scripts" / "finetune.sh").write_text("echo LLaVA's own\n")
    return package


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def python(root: Path, code: str) -> subprocess.CompletedProcess:
    # The checkout's llava is found first, as for a user who stands in it.
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '')\n{code}"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_scripts_are_copied_and_a_second_run_changes_nothing(package, capsys):
    assert checkout.main([str(package)]) == 0
    printed = capsys.readouterr().out
    for name in ("dpt.sh", "dft.sh", "sft.sh", "launch.sh", "zero2.json", "zero3.json", "teacher_finetune.sh"):
        assert (package / "scripts" / name).is_file()
    assert os.access(package / "scripts" / "dpt.sh", os.X_OK)
    assert not (package / "scripts" / "test.sh").exists()
    assert printed.count("  bash scripts/") == 3
    before = snapshot(package)
    assert checkout.main([str(package)]) == 0
    assert snapshot(package) == before
    assert "up to date" in capsys.readouterr().out


def test_only_scripts_for_a_checkout_are_copied(package, tmp_path, monkeypatch):
    """scripts/ of the repository holds more: benchmarks, the miniature with its weights, notes for readers."""
    source = tmp_path / "repository" / "scripts"
    shutil.copytree(about.folder("scripts"), source, ignore=shutil.ignore_patterns("miniature", "benchmark"))
    for name in ("miniature/weights/config.json", "miniature/run.sh", "benchmark/results.json", "eval/README.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    monkeypatch.setattr(about, "folder", lambda name: source.parent / name)
    report = checkout.copy_scripts(package)
    assert {path.name for path in (package / "scripts").iterdir() if path.is_dir()} == {"eval"}
    assert {path.suffix for path in (package / "scripts").rglob("*") if path.is_file()} == {".sh", ".json"}
    assert {"scripts/dft.sh", "scripts/launch.sh", "scripts/eval/pope.sh", "scripts/eval/common.sh"} <= set(
        report.copied
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((".git/HEAD", "pyproject.toml"), "git checkout of LLaVA"),
        (("pyproject.toml",), "LLaVA's sources, without git"),
        ((), "unpacked package of LLaVA"),
    ],
)
def test_a_folder_is_called_what_it_is(package, capsys, files, words):
    for name in files:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).touch()
    assert checkout.main([str(package)]) == 0
    assert capsys.readouterr().out.startswith(f"{package} ({words})\n")


def test_files_of_the_user_stay_unless_forced(clone, capsys):
    (clone / "scripts" / "dpt.sh").write_text("echo mine\n")
    assert checkout.main([str(clone)]) == 0
    assert (clone / "scripts" / "dpt.sh").read_text() == "echo mine\n"
    assert "scripts/dpt.sh" in next(line for line in capsys.readouterr().out.splitlines() if "kept" in line)
    assert checkout.main([str(clone), "--force"]) == 0
    ours = about.folder("scripts") / "dpt.sh"
    assert (clone / "scripts" / "dpt.sh").read_bytes() == ours.read_bytes()
    assert (clone / "scripts" / "finetune.sh").read_text() == "echo LLaVA's own\n"


def test_a_script_is_copied_whole_or_not_at_all(package, monkeypatch):
    """Half of one, left by a full disk or a kill, would be taken for the user's and stay."""
    replace = os.replace

    def full(source, target):
        if Path(target).name == "dft.sh":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckoutError, match=r"dft.sh cannot be written \(No space left on device\)"):
        checkout.main([str(package)])
    assert [path.name for path in (package / "scripts").glob("d*")] == [], "nothing of it is there"
    monkeypatch.undo()
    assert checkout.main([str(package)]) == 0
    ours = about.folder("scripts") / "dft.sh"
    assert (package / "scripts" / "dft.sh").read_bytes() == ours.read_bytes()
    assert os.access(package / "scripts" / "dft.sh", os.X_OK)
    assert not list(package.rglob("*tmp"))


def test_other_deepspeed_settings_of_llava_stay_even_when_forced(clone):
    other = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (clone / "scripts" / "zero2.json").write_text(json.dumps(other))
    shutil.copy(about.folder("scripts") / "zero3.json", clone / "scripts")
    assert checkout.main([str(clone), "--force"]) == 0
    assert json.loads((clone / "scripts" / "zero2.json").read_text()) == other
    ours = json.loads((clone / "scripts" / "compodistill_zero2.json").read_text())
    assert ours["zero_optimization"]["stage"] == 2
    assert not (clone / "scripts" / "compodistill_zero3.json").exists()


@pytest.mark.parametrize("kind, name", [("package", "zero2.json"), ("clone", "compodistill_zero2.json")])
def test_deepspeed_gets_our_settings(kind, name, request):
    root = request.getfixturevalue(kind)
    before = snapshot(root)
    for _ in range(2):
        assert checkout.main([str(root)]) == 0
    assert snapshot(root).items() >= before.items(), "LLaVA's own files stay"
    machine = {"GPUS": "8", "HAS_BF16": "1", "HAS_TF32": "1", "HAS_DEEPSPEED": "1", "DRY_RUN": "1"}
    command = ["bash", str(root / "scripts" / "dft.sh")]
    environment = {**os.environ, **machine, "PYTHON": sys.executable}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    config = Path(printed[printed.index("--deepspeed") + 1])
    assert config == root / "scripts" / name
    assert json.loads(config.read_text())["gradient_clipping"] == "auto"
    assert (root / "scripts" / name.replace("2", "3")).is_file()


def test_dry_run_writes_nothing(package, capsys):
    before = snapshot(package)
    assert checkout.main([str(package), "--patch", "--dry-run"]) == 0
    assert snapshot(package) == before
    assert "would be copied" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["package", "clone"])
def test_patch_and_unpatch_round_trip(kind, request, capsys):
    root = request.getfixturevalue(kind)
    before = {name: (root / name).read_bytes() for name in (HOOKED, MODELS)}
    assert checkout.main([str(root), "--patch"]) == 0
    printed = capsys.readouterr().out
    assert ("llava-c121f04" if kind == "clone" else "llava-torch-1.2.2.post1") in printed
    assert "__compodistill_patch__ = 1" in (root / HOOKED).read_text()
    assert "raise ImportError" in (root / MODELS).read_text()
    patched = snapshot(root)
    assert checkout.main([str(root), "--patch"]) == 0
    assert "applied already" in capsys.readouterr().out
    assert snapshot(root) == patched
    assert checkout.main([str(root), "--unpatch"]) == 0
    assert {name: (root / name).read_bytes() for name in (HOOKED, MODELS)} == before
    assert checkout.main([str(root), "--unpatch"]) == 0
    assert "nothing to undo" in capsys.readouterr().out


def test_a_patch_that_does_not_fit_changes_nothing(package):
    text = (package / MODELS).read_text()
    (package / MODELS).write_text(text.replace("except:", "except ImportError:"))
    before = snapshot(package)
    with pytest.raises(checkout.CheckoutError, match="import-error.*c121f04.*llava-torch 1.2.2.post1"):
        checkout.main([str(package), "--patch"])
    assert snapshot(package) == before


def test_windows_line_ends_are_kept(package):
    path = package / HOOKED
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    checkout.apply_patches(package)
    assert b"__compodistill_patch__ = 1\r\n" in path.read_bytes()
    checkout.apply_patches(package, undo=True)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(package, monkeypatch):
    before = snapshot(package)
    replace = os.replace

    def fail_on_models(source, target):
        if Path(target).parent.name == "model":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_models)
    with pytest.raises(patching.PatchError, match="Permission denied.*nothing was changed"):
        checkout.apply_patches(package)
    assert snapshot(package) == before


def test_a_full_disk_is_met_before_a_file_has_changed(package, monkeypatch):
    """The disk takes one file, and nothing after it: the first could not be put back."""
    before, written, replaced = snapshot(package), [], []
    write, replace = patching._write, os.replace

    def full(path, content, mode):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, mode)

    monkeypatch.setattr(patching, "_write", full)
    monkeypatch.setattr(os, "replace", lambda *names: replaced.append(names) or replace(*names))
    with pytest.raises(patching.PatchError, match="No space left on device.*nothing was changed"):
        checkout.apply_patches(package)
    assert snapshot(package) == before and len(written) == 2 and not replaced


def test_what_cannot_be_put_back_is_named_and_the_same_command_goes_on(package, monkeypatch):
    replace, done = os.replace, []

    def broken(source, target):
        if done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done.append(Path(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(patching.PatchError) as caught:
            checkout.apply_patches(package)
    assert f"{done[0]} could not be put back" in str(caught.value) and "Input/output error" in str(caught.value)
    assert checkout.apply_patches(package)
    assert {checkout.patch_state(package, purpose)[0] for purpose in checkout.PURPOSES} == {"applied"}
    assert not list(package.rglob("*tmp"))


def test_a_folder_that_is_no_checkout_is_an_error_with_a_hint(tmp_path, package, capsys):
    with pytest.raises(checkout.CheckoutError, match="git clone"):
        checkout.main([str(tmp_path / "nowhere")])
    assert cli.main(["init", str(tmp_path)]) == 2
    assert f"There is one in {package}" in capsys.readouterr().err
    assert not (tmp_path / "scripts").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_accepts_the_patches_and_makes_the_same_change(package):
    other = package.parent / "with-git"
    shutil.copytree(package, other)
    checkout.apply_patches(package)
    # Without the ceiling git would look for a repository above the folder and skip the files.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(other.parent)}
    for prefix in checkout.REVISIONS.values():
        names = [about.folder("patches") / f"{prefix}-{purpose}.patch" for purpose in checkout.PURPOSES]
        subprocess.run(["git", "apply", *map(str, names)], cwd=other, check=True, env=environment)
        for name in (HOOKED, MODELS):
            assert (other / name).read_bytes() == (package / name).read_bytes()
        subprocess.run(["git", "apply", "--reverse", *map(str, names)], cwd=other, check=True, env=environment)


def test_every_patch_is_known_to_the_command():
    expected = {f"{prefix}-{purpose}.patch" for prefix in checkout.REVISIONS.values() for purpose in checkout.PURPOSES}
    assert {path.name for path in about.folder("patches").glob("*.patch")} == expected


@pytest.mark.once
@pytest.mark.long
def test_a_patched_checkout_imports_in_any_order(package):
    checkout.apply_patches(package)
    firsts = [
        "import llava",
        "import llava_compodistill; llava_compodistill.register()",
        "import llava_compodistill.hosts.llava.loader",
        "import llava_compodistill.train.arguments",
        "import llava.eval.run_llava",
    ]
    code = f"""
import llava, llava_compodistill
assert llava.__file__.startswith({str(package)!r}), llava.__file__
assert llava.__compodistill_patch__ == 1
llava_compodistill.register()
from llava_compodistill.hosts.llava import registered
from llava.model import LlavaQwen2ForCausalLM
assert registered()
llava_compodistill.unregister()
assert not hasattr(llava.model, "LlavaQwen2ForCausalLM")
"""
    path = [str(package), *filter(None, sys.path)]
    for first, (status, printed) in zip(
        firsts, tiny.python_each([f"{first}\n{code}" for first in firsts], path), strict=True
    ):
        assert status == 0, f"{first}\n{printed}"


@pytest.mark.long
def test_a_patched_checkout_registers_by_itself_and_works_without_the_plugin(package):
    checkout.apply_patches(package)
    # A finder in front that denies the plugin's existence stands for an environment without it.
    absent = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llava_compodistill":
            raise ModuleNotFoundError(f"No module named {name!r}", name="llava_compodistill")
sys.meta_path.insert(0, Absent())
import transformers.trainer
import llava
assert llava.__compodistill_patch__ == 1 and "llava_compodistill" not in sys.modules
"""
    codes = ["import llava\nfrom llava.model import LlavaQwen2ForCausalLM", f"import sys\n{absent}"]
    for status, printed in tiny.python_each(codes, [str(package), *sys.path]):
        assert status == 0, printed


@pytest.mark.long
def test_the_real_import_error_is_shown(package):
    (package / "llava/model/language_model/llava_mistral.py").write_text("import a_package_that_is_not_there\n")
    checkout.apply_patches(package)
    result = python(package, "import llava")
    assert result.returncode != 0
    assert "No module named 'a_package_that_is_not_there'" in result.stderr.splitlines()[-1]
