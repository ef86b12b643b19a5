"""`python scripts/miniature …`: what `llava-compodistill miniature …` runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    # Python has put this folder itself on the path, where evaluate.py would hide the library of that name.
    sys.path[0] = str(ROOT / "scripts")
    if importlib.util.find_spec("llava_compodistill") is None:
        sys.exit(
            f"llava_compodistill is not installed in {sys.prefix}: bash {ROOT}/scripts/quickstart.sh sets up an "
            f"environment of its own; {sys.executable} -m pip install {ROOT} installs it here."
        )
    from miniature.cli import main

    sys.exit(main())
