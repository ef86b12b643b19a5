"""`llava-compodistill env`: versions, hardware and optional parts, to be pasted into a bug report.

Nothing here may fail: what is absent or broken is a row of the report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..about import __version__, commit, git_commit


@dataclass(frozen=True)
class Row:
    """One line of the report. `version` is None for what is not installed; `detail` then says how to get it."""

    name: str
    version: str | None
    detail: str = ""


#: Distribution -> why it is needed or what it gives, and the way to install it. In the order of the report.
REQUIRED = {
    "transformers": "pip install 'transformers>=4.37.2'",
    "tokenizers": "pip install tokenizers",
    "accelerate": "pip install accelerate",
    "peft": "pip install peft",
    "sentencepiece": "pip install sentencepiece",
    "safetensors": "pip install safetensors",
}
#: Of these, what breaks when its versions do not fit the others'.
IMPORTED = ("peft",)
OPTIONAL = {
    "deepspeed": "ZeRO on several GPUs: pip install 'llava-compodistill[deepspeed]'",
    "flash-attn": "flash attention 2: pip install 'llava-compodistill[flash]' (CUDA); SDPA is used without it",
    "triton": "attention maps by GPU kernels; comes with CUDA builds of torch",
    "bitsandbytes": "4 and 8 bit loading: pip install 'llava-compodistill[quant]'",
    "tensorboard": "--report_to tensorboard: pip install 'llava-compodistill[tensorboard]'",
    "wandb": "--report_to wandb: pip install 'llava-compodistill[wandb]'",
}


def collect() -> list[Row]:
    """Every row of the report."""
    rows = [
        _plugin_row(),
        _llava_row(),
        Row("python", platform.python_version(), sys.executable),
        Row("platform", platform.system(), platform.platform()),
        *_torch_rows(),
    ]
    rows += [_package_row(name, hint) for name, hint in REQUIRED.items()]
    rows += [_package_row(name, f"optional; {gives}") for name, gives in OPTIONAL.items()]
    return rows


def _plugin_row() -> Row:
    return Row(
        "llava_compodistill", __version__, f"{Path(__file__).resolve().parents[1]}, commit {commit() or 'unknown'}"
    )


def _llava_row() -> Row:
    # Found without importing it: a broken LLaVA must not break the report.
    try:
        spec = importlib.util.find_spec("llava")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return Row("llava", None, "stand in a LLaVA checkout, or: pip install --no-deps llava-torch==1.2.2.post1")
    package = Path(spec.origin).parent
    version = _version("llava-torch", package) or _version("llava", package) or _pyproject_version(package.parent)
    git = git_commit(package.parent) if (package.parent / ".git").exists() else None
    details = [str(package)] + ([f"commit {git}"] if git else [])
    try:
        patched = "__compodistill_patch__" in Path(spec.origin).read_text(encoding="utf-8")
        details.append("patched" if patched else "not patched")
    except OSError as error:
        details.append(f"unreadable: {error.strerror}")
    return Row("llava", version or "unknown version", ", ".join(details))


def _version(distribution: str, package: Path) -> str | None:
    """Version of a distribution, if it is the one that this package folder belongs to."""
    try:
        found = importlib.metadata.distribution(distribution)
        belongs = Path(str(found.locate_file(package.name))).resolve() == package.resolve()
        return found.version if belongs else None
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _pyproject_version(root: Path) -> str | None:
    try:
        lines = (root / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split('"')[1] for line in lines if line.startswith("version = ")), None)


def _package_row(name: str, hint: str) -> Row:
    try:
        return Row(name, importlib.metadata.version(name), _import_problem(name) if name in IMPORTED else "")
    except importlib.metadata.PackageNotFoundError:
        return Row(name, None, hint)
    except Exception as error:  # damaged metadata is for the report to show
        return Row(name, None, f"unreadable metadata: {error}")


def _import_problem(name: str) -> str:
    try:
        importlib.import_module(name)
        return ""
    except Exception as error:
        return f"cannot be imported beside these versions: {error}"


def _torch_rows() -> list[Row]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken CUDA library raises OSError, an absent torch ImportError
        return [Row("torch", None, f"{type(error).__name__}: {error}; pip install torch")]
    try:
        if not torch.cuda.is_available():
            return [
                Row("torch", torch.__version__, f"CUDA build {torch.version.cuda or 'none'}, no CUDA device"),
                Row("devices", "cpu", f"{torch.get_num_threads()} threads"),
            ]
        rows = [Row("torch", torch.__version__, f"CUDA {torch.version.cuda}, bf16 {torch.cuda.is_bf16_supported()}")]
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute {device.major}.{device.minor}"
            rows.append(Row(f"cuda:{index}", device.name, f"{device.total_memory / 2**30:.0f} GiB, {capability}"))
        return rows
    except Exception as error:  # a driver in trouble is what a bug report is about
        return [Row("torch", torch.__version__, f"CUDA cannot be asked: {error}")]


def as_json(rows: Sequence[Row]) -> str:
    """The report for machines: name -> {version, detail}."""
    entries = {row.name: {key: value for key, value in asdict(row).items() if key != "name"} for row in rows}
    return json.dumps(entries, indent=2)


def as_text(rows: Sequence[Row]) -> str:
    """The report as plain columns, for pipes and bug reports."""
    names = max(len(row.name) for row in rows)
    versions = max(len(row.version or "not installed") for row in rows)
    lines = (f"{row.name:<{names}}  {row.version or 'not installed':<{versions}}  {row.detail}" for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="llava-compodistill env")
    for column in ("part", "version", "detail"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.version or "not installed", row.detail, style=None if row.version else "dim")
    Console().print(table, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llava-compodistill env`."""
    parser = argparse.ArgumentParser(
        prog="llava-compodistill env", description="Print versions, hardware and optional packages, for bug reports."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    rows = collect()
    if arguments.json:
        print(as_json(rows))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_table(rows)
    else:
        print(as_text(rows))
    return 0
