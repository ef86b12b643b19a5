"""The folders that travel with the package: `scripts/` and `patches/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("scripts", "patches")


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
