"""`llava-compodistill miniature …`: runs the miniature world, which lies in the repository and not in the wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .. import about
from ..errors import RepositoryError


def find_scripts() -> Path:
    """The `scripts` folder of a checkout of this repository: of the one that this package is imported from, or else of
    the one around the current folder.

    Raises:
        RepositoryError: when there is neither.
    """
    here = Path.cwd()
    for root in (Path(about.__file__).resolve().parents[1], here, *here.parents):
        if (root / "setup.py").is_file() and (root / "scripts" / "miniature" / "__main__.py").is_file():
            return root / "scripts"
    raise RepositoryError(
        "the miniature world comes with the repository of llava_compodistill, not with the installed package, and "
        f"{here} is not inside a checkout of it. Get the source (git clone, or the archive of version "
        f"{about.__version__}) and run this command in that folder; bash scripts/quickstart.sh there does the rest."
    )


def main(argv: Sequence[str]) -> int:
    """Pass the arguments on to the checkout's miniature."""
    sys.path.insert(0, str(find_scripts()))
    from miniature.cli import main as miniature

    return miniature(argv)
