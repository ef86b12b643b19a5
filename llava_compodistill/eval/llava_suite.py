"""LLaVA's own benchmarks through scripts/eval/*.sh: its modules ask and score; this makes records and summaries."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..about import commit, folder
from ..errors import DataError, MissingData
from . import llava_records, scorers
from .llava_answers import read_answers, read_questions
from .records import write_lines
from .shares import stopped_together
from .suite import PAPER_MODELS, notes_on


def _none(text: str) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class LlavaBenchmark:
    """One of LLaVA's benchmarks.

    Attributes:
        questions: its file below the data root; without it the benchmark is left out of `all`.
        images: the folder of its images.
        needs: what its scorer or converter reads besides.
        headline: the figure in the table.
        read: what LLaVA's or the official scorer prints -> figures; empty while there is no score.
        score: records with labels -> figures; None where the labels are on a server.
        labels: where the labels have to lie to be counted with.
        paper: the paper's (teacher, SFT, CompoDistill), in %; those that have it make up its VQA average.
    """

    name: str
    title: str
    questions: str
    images: str
    headline: str
    read: Callable[[str], dict[str, float]] = _none
    score: Callable[[Iterable[dict[str, Any]]], dict[str, Any]] | None = None
    paper: tuple[float, ...] = ()
    labels: str = ""
    needs: str = ""


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


LLAVA_BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        LlavaBenchmark(
            "vqav2", "VQAv2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2/test2015",
            "accuracy", paper=(79.1, 73.6, 78.8), needs="vqav2/llava_vqav2_mscoco_test2015.jsonl",
        ),
        LlavaBenchmark(
            "gqa", "GQA", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images",
            "accuracy", read_accuracy, scorers.gqa, (62.1, 57.9, 62.2), "gqa/data/testdev_balanced_questions.json",
        ),
        LlavaBenchmark(
            "vizwiz", "VizWiz", "vizwiz/llava_test.jsonl", "vizwiz/test",
            "accuracy", paper=(48.0, 31.2, 42.5),
        ),
        LlavaBenchmark(
            "textvqa", "TextVQA", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images",
            "accuracy", read_accuracy, scorers.textvqa, (56.7, 50.6, 56.4), needs="textvqa/TextVQA_0.5.1_val.json",
        ),
        LlavaBenchmark(
            "mme", "MME", "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version",
            "percent", read_mme, scorers.mme, (67.2, 61.2, 70.1), "MME/MME_Benchmark_release_version/TASK/*.txt",
        ),
        LlavaBenchmark(
            "pope", "POPE", "pope/llava_pope_test.jsonl", "pope/val2014",
            "f1", read_pope, scorers.pope, needs="pope/coco",
        ),
    )
}  # fmt: skip
#: What scripts/eval/common.sh says of a scorer that ended with an error.
SCORER_FAILED = "The scorer failed"
#: Scorers print two or three digits.
_ROUNDING = 0.06


def check(name: str, data: Path) -> None:
    """Read a benchmark's questions and look for its images.

    Raises:
        MissingData: when its files are not there at all.
        RecordsError: for a wrong question or a missing image, with file and line.
    """
    benchmark = LLAVA_BENCHMARKS[name]
    for path in (data / benchmark.questions, data / benchmark.images, data / benchmark.needs):
        if not path.exists():
            raise MissingData(f"{path} is missing: see LLaVA's docs/Evaluation.md (its eval.zip goes to {data}).")
    read_questions(data / benchmark.questions, data / benchmark.images)


def run_llava_benchmark(
    name: str,
    model_path: str,
    data: Path,
    output: Path,
    *,
    conv_mode: str,
    model_base: str | None = None,
    model_name: str | None = None,
    devices: Sequence[str | None] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run scripts/eval/NAME.sh, which asks LLaVA's module and ends with `summarize`; returns the summary.

    Args:
        devices: CUDA_VISIBLE_DEVICES of each process, None for the CPU; none leave it to the script.

    Raises:
        DataError: when the script fails.
    """
    settings = {"EVAL_DATA": str(data), "CONV_MODE": conv_mode, "PYTHON": sys.executable, "OUTPUT": str(output)}
    settings |= {"OVERWRITE": str(int(overwrite)), "TABLE": "0", "MODEL_BASE": model_base or ""}
    settings |= {"MODEL_NAME": model_name or ""}
    if devices:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join("-1" if name is None else name for name in devices)
    command = ["bash", str(folder("scripts") / "eval" / f"{name}.sh"), model_path]
    with stopped_together() as processes:
        processes.append(subprocess.Popen(command, env={**os.environ, **settings}))
        status = processes[0].wait()
    if status:
        raise DataError(f"scripts/eval/{name}.sh ended with status {status}, see above; what was answered is kept.")
    return json.loads((output / f"{name}.json").read_text(encoding="utf-8"))


def summarize(name: str, answers: Path, data: Path, output: Path, printed: str = "") -> dict[str, Any]:
    """Records and summary of one of LLaVA's benchmarks, from LLaVA's answers.

    The value is counted from the records where the labels lie on this machine, else it is what a scorer printed, else
    None. LLaVA's and the official scorers count alike, but that POPE's takes an empty answer for a yes.

    Args:
        answers: the file that `llava_answers.join` wrote.
        printed: what LLaVA's or the official scorer said; a `No score yet: …` in it becomes the summary's note.

    Returns:
        The summary, also written to OUTPUT/NAME.json; the records go to OUTPUT/NAME.jsonl.

    Raises:
        DataError, RecordsError: for files that do not fit together, named with the place.
    """
    benchmark = LLAVA_BENCHMARKS[name]
    made_with = json.loads(answers.with_name(answers.name + ".run.json").read_text(encoding="utf-8"))
    given = read_answers(answers)
    records = llava_records.READERS[name](data, given)
    labelled = benchmark.score is not None and bool({"label", "value"} & records[0].keys())
    figures = benchmark.score(records) if labelled and benchmark.score else {}
    said = benchmark.read(printed)
    figures["empty"] = sum(not entry["text"].strip() for entry in given)
    notes = []
    for word in ("No score yet", SCORER_FAILED):
        if word in printed:
            notes.append(" ".join(printed[printed.index(word) :].split()))
    if not labelled and not said and not notes:
        notes.append(f"No score yet: there is neither the official scorer nor {data / benchmark.labels}.")
    key = benchmark.headline
    if key in said and key in figures and abs(said[key] - figures[key]) > _ROUNDING:
        notes.append(f"The scorer printed {key} {said[key]:.2f}; counted from the records it is {figures[key]:.2f}.")
    notes += notes_on(figures)
    summary = {
        "benchmark": name,
        "protocol": "LLaVA's",
        **{key: made_with[key] for key in ("model", "weights", "template", "fingerprint")},
        "items": len(records),
        "headline": benchmark.headline,
        "value": figures.get(benchmark.headline, said.get(benchmark.headline)),
        "figures": figures,
        "printed": said,
        "note": " ".join(notes),
        "paper": dict(zip(PAPER_MODELS, benchmark.paper, strict=True)) if benchmark.paper else {},
        "commit": commit(),
    }
    write_lines(output / f"{name}.jsonl", records)
    (output / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The end of scripts/eval/NAME.sh: shows what a scorer prints, writes records and summary, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.llava_suite", description=main.__doc__)
    parser.add_argument("name", choices=LLAVA_BENCHMARKS)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=int, choices=(0, 1), default=1)
    args = parser.parse_args(argv)
    lines = []
    for line in sys.stdin:
        print(line, end="", flush=True)
        lines.append(line)
    try:
        summary = summarize(args.name, args.answers, args.data_root, args.output, "".join(lines))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.table:
        from rich.console import Console

        from .summaries import show

        show([summary], Path(summary["model"]).name, Console())
    return int(summary["value"] is None and SCORER_FAILED in summary["note"])


if __name__ == "__main__":
    sys.exit(main())
