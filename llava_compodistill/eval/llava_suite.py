"""LLaVA's own benchmarks through scripts/eval/*.sh: its modules answer and score, this reads what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..env_report import commit
from ..resources import folder
from .formats import DataError
from .suite import PAPER_MODELS


@dataclass(frozen=True)
class LlavaBenchmark:
    """One of LLaVA's benchmarks.

    Attributes:
        questions: its file below the data root; without it the benchmark is left out of `all`.
        read: printed text -> figures; empty while there is no score.
        headline: the figure in the table.
        converter: the script of LLaVA's repository that it needs.
        paper: the paper's (teacher, SFT, CompoDistill), in %; those that have it make up its VQA average.
    """

    name: str
    title: str
    questions: str
    read: Callable[[str], dict[str, float]]
    headline: str
    converter: str = ""
    paper: tuple[float, ...] = ()


def read_pope(text: str) -> dict[str, float]:
    """eval_pope prints a block a category; shares, here in %."""
    figures: dict[str, float] = {}
    for block in text.split("Category: ")[1:]:
        category = block.split(",")[0]
        for name, label in (("accuracy", "Accuracy"), ("f1", "F1 score"), ("yes_ratio", "Yes ratio")):
            found = re.search(rf"{label}: ([\d.]+)", block)
            if found:
                figures[f"{name}_{category}"] = 100 * float(found.group(1))
    for name in ("f1", "accuracy"):
        values = [value for key, value in figures.items() if key.startswith(f"{name}_")]
        if values:
            figures[name] = mean(values)
    return figures


def read_accuracy(text: str) -> dict[str, float]:
    """The last `Accuracy: 61.3%`, as eval_textvqa and GQA's eval.py print it."""
    found = re.findall(r"Accuracy: ([\d.]+)%", text)
    return {"accuracy": float(found[-1])} if found else {}


def read_mme(text: str) -> dict[str, float]:
    """calculation.py prints a `total score` for perception (of 2,000) and one for cognition (of 800). `percent` is the
    share of perception's, as which the paper's figures (61 to 78) can only be read."""
    names = ("perception", "cognition")
    figures = dict(zip(names, map(float, re.findall(r"total score: ([\d.]+)", text)), strict=False))
    if "perception" in figures:
        figures["percent"] = figures["perception"] / 20
    return figures


def _none(text: str) -> dict[str, float]:
    return {}


LLAVA_BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        LlavaBenchmark(
            "vqav2", "VQAv2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", _none, "accuracy",
            "convert_vqav2_for_submission.py", (79.1, 73.6, 78.8),
        ),
        LlavaBenchmark(
            "gqa", "GQA", "gqa/llava_gqa_testdev_balanced.jsonl", read_accuracy, "accuracy",
            "convert_gqa_for_eval.py", (62.1, 57.9, 62.2),
        ),
        LlavaBenchmark(
            "vizwiz", "VizWiz", "vizwiz/llava_test.jsonl", _none, "accuracy",
            "convert_vizwiz_for_submission.py", (48.0, 31.2, 42.5),
        ),
        LlavaBenchmark(
            "textvqa", "TextVQA", "textvqa/llava_textvqa_val_v051_ocr.jsonl", read_accuracy, "accuracy",
            paper=(56.7, 50.6, 56.4),
        ),
        LlavaBenchmark("mme", "MME", "MME/llava_mme.jsonl", read_mme, "percent", paper=(67.2, 61.2, 70.1)),
        LlavaBenchmark("pope", "POPE", "pope/llava_pope_test.jsonl", read_pope, "f1"),
    )
}  # fmt: skip


def check(name: str, data: Path) -> None:
    """Raise DataError when a benchmark's questions, or LLaVA's converter for its answers, are not there."""
    benchmark = LLAVA_BENCHMARKS[name]
    path = data / benchmark.questions
    if not path.is_file():
        raise DataError(f"{path} is missing: see LLaVA's docs/Evaluation.md (its eval.zip goes to {data}).")
    if benchmark.converter and not (Path("scripts") / benchmark.converter).is_file():
        raise DataError(f"{benchmark.title} needs scripts/{benchmark.converter}: stand in a git checkout of LLaVA.")


def run_llava_benchmark(
    name: str,
    model_path: str,
    data: Path,
    output: Path,
    *,
    conv_mode: str,
    model_base: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run scripts/eval/NAME.sh and show what it prints.

    Returns:
        The summary, also written to OUTPUT/NAME.json; its value is None where the score comes from elsewhere, and
        `note` says from where.

    Raises:
        DataError: when the script fails; its last lines are in the message.
    """
    benchmark = LLAVA_BENCHMARKS[name]
    settings = {"EVAL_DATA": str(data), "CONV_MODE": conv_mode, "PYTHON": sys.executable}
    settings["OVERWRITE"] = str(int(overwrite))
    if model_base:
        settings["MODEL_BASE"] = model_base
    command = ["bash", str(folder("scripts") / "eval" / f"{name}.sh"), model_path]
    lines: list[str] = []
    with subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise DataError(f"scripts/eval/{name}.sh ended with status {process.returncode}; see above.")
    text = "".join(lines)
    figures = benchmark.read(text)
    note = " ".join(text[text.index("No score yet") :].split()) if "No score yet" in text else ""
    summary = {
        "benchmark": name,
        "protocol": "LLaVA's",
        "model": model_path,
        "template": conv_mode,
        "headline": benchmark.headline,
        "value": figures.get(benchmark.headline),
        "figures": figures,
        "note": note,
        "paper": dict(zip(PAPER_MODELS, benchmark.paper, strict=True)) if benchmark.paper else {},
        "commit": commit(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary
