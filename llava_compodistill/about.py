"""What this installation is: its version, its commit, and the folders that travel with it (`scripts/`, `patches/`)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("scripts", "patches")


def commit() -> str | None:
    """Commit of this package: of its checkout, or the one recorded when the wheel was built."""
    if (_PACKAGE.parent / "setup.py").is_file():
        return git_commit(_PACKAGE.parent)
    try:
        return json.loads((_PACKAGE / "build_info.json").read_text(encoding="utf-8")).get("commit")
    except (OSError, ValueError):
        return None


def git_commit(root: Path) -> str | None:
    """Commit of a git checkout, `-dirty` when it has changes; None where git does not know."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return result.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """What measured results depend on beside their settings, to be kept with them."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
    }


def folder(name: str) -> Path:
    """Path of a folder shipped with the package.

    A wheel holds it inside the package; a source checkout and an editable install keep it beside the package, next to
    setup.py.

    Raises:
        ValueError: for a name that is not shipped.
        FileNotFoundError: when this installation lacks the folder.
    """
    if name not in FOLDERS:
        raise ValueError(f"folder {name!r} is not shipped with llava_compodistill; there are: {', '.join(FOLDERS)}.")
    inside = _PACKAGE / name
    if inside.is_dir():
        return inside
    beside = _PACKAGE.parent / name
    if beside.is_dir() and (_PACKAGE.parent / "setup.py").is_file():
        return beside
    raise FileNotFoundError(
        f"{inside} is missing: this installation of llava_compodistill is incomplete. Reinstall it (pip install "
        "--force-reinstall --no-deps llava-compodistill, or pip install . in its checkout)."
    )
