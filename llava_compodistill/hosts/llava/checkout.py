"""`llava-compodistill init`: our scripts, and on request our patches, in a LLaVA checkout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ... import about
from ...errors import CheckoutError
from .patching import Patch, plan, read_patch, replace_whole, write_all

#: Files by which a LLaVA checkout is known, whether cloned or unpacked from the registry's wheel.
LANDMARKS = ("llava/__init__.py", "llava/model/__init__.py", "llava/model/builder.py", "llava/train/train.py")
#: The folders of scripts/ that are copied; the others serve this project's own repository.
COPIED_FOLDERS = (".", "eval")
#: Scripts beside the copied ones that have no meaning in a LLaVA checkout either.
REPOSITORY_ONLY = {"quickstart.sh", "setup_env.sh", "test.sh"}
#: DeepSpeed settings that LLaVA ships under the same name: LLaVA's are left alone, and ours, which pass
#: --max_grad_norm on, get a longer name.
SHARED_WITH_LLAVA = {"zero2.json", "zero3.json"}
#: Supported revision -> the beginning of its patches' file names.
REVISIONS = {
    "LLaVA c121f04 (git, 2024-05)": "llava-c121f04",
    "llava-torch 1.2.2.post1 (package registry)": "llava-torch-1.2.2.post1",
}
PURPOSES = ("plugin-hook", "import-error")


@dataclass
class Report:
    """What `init` did, or would do: names below the checkout."""

    copied: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(root: Path) -> None:
    """Make sure that `root` is a LLaVA checkout.

    Raises:
        CheckoutError: with the file that is missing and the way out.
    """
    missing = [name for name in LANDMARKS if not (root / name).is_file()]
    if not missing:
        return
    below = [child.name for child in sorted(root.iterdir()) if child.is_dir()] if root.is_dir() else []
    inside = [name for name in below if all((root / name / landmark).is_file() for landmark in LANDMARKS)]
    hint = (
        f"There is one in {root / inside[0]}: name that folder."
        if inside
        else (
            "Clone it (git clone https://github.com/haotian-liu/LLaVA), or unpack the registry's copy (pip install "
            "--no-deps --target LLaVA llava-torch==1.2.2.post1), and name that folder."
        )
    )
    raise CheckoutError(f"{root} is no LLaVA checkout: {missing[0]} is missing. {hint}")


def is_clone(root: Path) -> bool:
    """Whether the files come from LLaVA's repository (cloned, or downloaded without git) rather than from the
    registry's wheel."""
    return (root / ".git").exists() or (root / "pyproject.toml").exists()


def describe(root: Path) -> str:
    """What kind of checkout it is, in words."""
    if (root / ".git").exists():
        return "git checkout of LLaVA"
    return "LLaVA's sources, without git" if is_clone(root) else "unpacked package of LLaVA"


def copy_scripts(root: Path, force: bool = False, dry_run: bool = False) -> Report:
    """Copy our scripts into `root/scripts`; a file there that differs is the user's and stays, unless `force`.

    A script is there whole or not at all: half of one would be taken for the user's.

    Raises:
        CheckoutError: for a file that cannot be written.
    """
    report = Report()
    source = about.folder("scripts")
    files = [path for folder in COPIED_FOLDERS for path in (source / folder).glob("*")]
    for path in sorted(path for path in files if path.suffix in (".sh", ".json")):
        name = path.relative_to(source).as_posix()
        if name in REPOSITORY_ONLY:
            continue
        if name in SHARED_WITH_LLAVA:
            if _differs(path, root / "scripts" / name):
                report.notes.append(
                    f"scripts/{name} is LLaVA's or yours and stays; ours is scripts/compodistill_{name}"
                )
                name = f"compodistill_{name}"
        target = root / "scripts" / name
        label = f"scripts/{name}"
        if not target.exists():
            report.copied.append(label)
        elif not _differs(path, target):
            report.unchanged.append(label)
            continue
        elif force:
            report.replaced.append(label)
        else:
            report.kept.append(label)
            continue
        if not dry_run:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_whole(target, path.read_bytes(), 0o755 if path.suffix == ".sh" else 0o644)
            except OSError as error:
                raise CheckoutError(
                    f"{target} cannot be written ({error.strerror}). When it can, the same command goes on from there."
                ) from error
    return report


def _differs(ours: Path, theirs: Path) -> bool:
    """Whether a file exists in the checkout with another meaning: JSON by value, the rest byte by byte."""
    if not theirs.exists():
        return False
    if ours.suffix == ".json":
        try:
            return json.loads(ours.read_text(encoding="utf-8")) != json.loads(theirs.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return True
    return ours.read_bytes() != theirs.read_bytes()


def patch_state(root: Path, purpose: str) -> tuple[str, Path | None]:
    """("absent" | "applied" | "unsupported", the patch file that fits this checkout)."""
    # The kind of checkout decides which name is reported when both revisions hold the same lines.
    prefixes = sorted(REVISIONS.values(), key=lambda prefix: prefix.startswith("llava-torch") == is_clone(root))
    for prefix in prefixes:
        path = about.folder("patches") / f"{prefix}-{purpose}.patch"
        patch = read_patch(path)
        if plan(root, patch, reverse=True) is not None:
            return "applied", path
        if plan(root, patch) is not None:
            return "absent", path
    return "unsupported", None


def apply_patches(root: Path, undo: bool = False, dry_run: bool = False) -> list[str]:
    """Apply (or undo) the patch of every purpose; all are checked before the first file is written.

    Returns:
        One line for each purpose, saying what was done.

    Raises:
        CheckoutError: when a patch fits neither forwards nor backwards; nothing is changed then.
    """
    lines: list[str] = []
    contents: dict[Path, str] = {}
    for purpose in PURPOSES:
        state, path = patch_state(root, purpose)
        if path is None:
            raise CheckoutError(
                f"{root}: the {purpose} patch fits no file here, neither applied nor original. Nothing was changed. "
                f"Supported: {'; '.join(REVISIONS)}. Put back {_touched(purpose)} as LLaVA ships it, or go without "
                "the patch: llava-compodistill run and our scripts do not need it."
            )
        if state == ("absent" if undo else "applied"):
            lines.append(f"{path.name}: {'not applied, nothing to undo' if undo else 'applied already'}")
            continue
        patch: Patch = read_patch(path)
        contents.update(plan(root, patch, reverse=undo) or {})
        lines.append(f"{path.name}: {'undone' if undo else 'applied'}")
    if not dry_run:
        write_all(contents)
    return lines


def _touched(purpose: str) -> str:
    return ", ".join(read_patch(about.folder("patches") / f"{next(iter(REVISIONS.values()))}-{purpose}.patch"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill init`."""
    parser = argparse.ArgumentParser(
        prog="llava-compodistill init",
        description="Put the training scripts into a LLaVA checkout (git clone or unpacked wheel), and patch it.",
    )
    parser.add_argument("dir", nargs="?", default=".", metavar="DIR", help="the checkout (default: this folder)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--patch", action="store_true", help="also let the checkout load the plugin by itself")
    group.add_argument("--unpatch", action="store_true", help="undo --patch; scripts are left as they are")
    parser.add_argument("--force", action="store_true", help="replace scripts of the same name that differ from ours")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and change nothing")
    arguments = parser.parse_args(argv)
    root = Path(arguments.dir).expanduser().resolve()
    verify(root)
    would = "would be " if arguments.dry_run else ""
    # The patches go first: they can be refused, and then nothing at all has been written.
    patched = (
        apply_patches(root, undo=arguments.unpatch, dry_run=arguments.dry_run)
        if arguments.patch or arguments.unpatch
        else []
    )
    print(f"{root} ({describe(root)})")
    if not arguments.unpatch:
        report = copy_scripts(root, force=arguments.force, dry_run=arguments.dry_run)
        for verb, names in (("copied", report.copied), ("replaced", report.replaced)):
            if names:
                print(f"  {would}{verb}: {', '.join(names)}")
        if report.unchanged:
            print(f"  up to date: {len(report.unchanged)} scripts")
        if report.kept:
            print(f"  kept, they differ from ours (--force replaces them): {', '.join(report.kept)}")
        for note in report.notes:
            print(f"  {note}")
    for line in patched:
        print(f"  patch {would}{line}" if would else f"  patch {line}")
    if not arguments.unpatch and not arguments.dry_run:
        print("Next, in that folder (each script lists its settings at the top; DRY_RUN=1 prints the command):")
        for script in ("dpt.sh", "dft.sh", "sft.sh"):
            print(f"  bash scripts/{script}")
        print("They need a teacher: TEACHER=<LLaVA checkpoint>, or train one with scripts/teacher_pretrain.sh and")
        print("scripts/teacher_finetune.sh.")
    return 0
