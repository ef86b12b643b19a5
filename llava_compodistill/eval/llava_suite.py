"""LLaVA's own benchmarks through scripts/eval/*.sh: its module asks, or `vqa_loader` in its place, and its modules
score; this makes records and summaries."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..about import __version__, commit, folder
from ..errors import DataError
from ..hosts.files import read_object
from .benchmarks import registered
from .benchmarks.files import named_below, noted, value
from .benchmarks.llava import LlavaBenchmark, read_answers, read_questions
from .checkpoint import prompt_of
from .llava_answers import LLAVA
from .pins import asking, pins
from .records import scoring, write_lines
from .run import notes_on
from .shares import stopped_together
from .summaries import show

PROTOCOL = "LLaVA's"
#: What scripts/eval/common.sh says of a scorer that ended with an error.
SCORER_FAILED = "The scorer failed"
#: Scorers print two or three digits.
_ROUNDING = 0.06


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
    engine: bool = False,
    batch_size: int = 16,
    dtype: str | None = None,
    image_workers: int | None = None,
) -> dict[str, Any]:
    """Run scripts/eval/NAME.sh, which asks LLaVA's module and ends with `summarize`; returns the summary.

    Args:
        devices: CUDA_VISIBLE_DEVICES of each process, None for the CPU; none leave it to the script.
        engine: ask through `vqa_loader` in the module's place, `batch_size` questions at a time.
        dtype: of the engine's model; by default that of LLaVA's module.
        image_workers: of each engine.

    Raises:
        DataError: when the script fails.
    """
    settings = {"EVAL_DATA": str(data), "CONV_MODE": conv_mode, "PYTHON": sys.executable, "OUTPUT": str(output)}
    settings |= {"OVERWRITE": str(int(overwrite)), "TABLE": "0", "MODEL_BASE": model_base or ""}
    settings |= {"MODEL_NAME": model_name or ""}
    settings |= {"ENGINE": str(int(engine)), "BATCH_SIZE": str(batch_size), "DTYPE": dtype or ""}
    settings |= {"IMAGE_WORKERS": "" if image_workers is None else str(image_workers)}
    if devices:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join("-1" if name is None else name for name in devices)
    command = ["bash", str(folder("scripts") / "eval" / f"{name}.sh"), model_path]
    with stopped_together() as processes:
        processes.append(subprocess.Popen(command, env={**os.environ, **settings}))
        status = processes[0].wait()
    if status:
        raise DataError(f"scripts/eval/{name}.sh ended with status {status}, see above; what was answered is kept.")
    return read_object(output / f"{name}.json")


def summarize(name: str, answers: Path, data: Path, output: Path, printed: str = "") -> dict[str, Any]:
    """Records and summary of one of LLaVA's benchmarks, from LLaVA's answers.

    The value is counted from the records where the labels lie on this machine, else it is what a scorer printed, else
    None. LLaVA's and the official scorers count as the reading "official" does.

    Args:
        answers: the file that `llava_answers.join` wrote.
        printed: what LLaVA's or the official scorer printed; a `No score yet: …` in it becomes the summary's note.

    Returns:
        The summary, also written to OUTPUT/NAME.json; the records go to OUTPUT/NAME.jsonl.

    Raises:
        DataError, RecordsError: for files that do not fit together, named with the place.
    """
    benchmark = registered(LlavaBenchmark)[name]
    made_with = read_object(answers.with_name(answers.name + ".run.json"))
    for field in ("model", "weights", "template", "fingerprint"):
        value(made_with, field, f"{answers.name}.run.json")
    asked_by = made_with.get("asked_by", LLAVA)
    given = read_answers(answers)
    with noted() as read:
        if (data / benchmark.questions).is_file():  # answers may be counted elsewhere than where they were given
            read_questions(data / benchmark.questions)
        records = benchmark.records(data, given)
    prompt, limits = prompt_of(made_with["model"], made_with["template"]), [made_with.get("max_new_tokens", 128)]
    labelled = benchmark.score is not None and bool({"label", "value"} & records[0].keys())
    scored: dict[str, Any] = {"value": None, "figures": {}, "readings": {}}
    if labelled:
        with scoring(answers, benchmark.title):
            scored = benchmark.scored(records, PROTOCOL)
    figures = scored["figures"]
    reported = benchmark.read_printed(printed)
    figures["empty"] = sum(not entry["text"].strip() for entry in given)
    notes = []
    for word in ("No score yet", SCORER_FAILED):
        if word in printed:
            notes.append(" ".join(printed[printed.index(word) :].split()))
    if not labelled and not reported and not notes:
        notes.append(f"No score yet: there is neither the official scorer nor {data / benchmark.labels}.")
    key = benchmark.headline
    theirs = scored["readings"].get("official", {}).get("figures", figures)  # what their scorers print
    if key in reported and key in theirs and abs(reported[key] - theirs[key]) > _ROUNDING:
        notes.append(
            f"The scorer printed {key} {reported[key]:.2f}; counted from the records it is {theirs[key]:.2f}."
        )
    notes += notes_on(figures)
    summary = {
        "benchmark": name,
        "protocol": PROTOCOL,
        "asked_by": asked_by,
        **{key: made_with[key] for key in ("model", "weights", "template", "fingerprint")},
        "items": len(records),
        "pins": pins(
            {"protocol": PROTOCOL, "asked_by": asked_by, **made_with, **asking(PROTOCOL, prompt, limits)},
            scored["readings"],
            named_below(data, read),
        ),
        "headline": benchmark.headline,
        **scored,
        "value": figures.get(benchmark.headline, reported.get(benchmark.headline)),
        "printed": reported,
        "note": " ".join(notes),
        "paper": benchmark.paper_figures(PROTOCOL),
        "version": __version__,
        "commit": commit(),
    }
    write_lines(output / f"{name}.jsonl", records)
    (output / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The end of scripts/eval/NAME.sh: shows what a scorer prints, writes records and summary, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.llava_suite", description=main.__doc__)
    parser.add_argument("name", choices=registered(LlavaBenchmark))
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
        show([summary], Path(summary["model"]).name, Console())
    return int(summary["value"] is None and SCORER_FAILED in summary["note"])


if __name__ == "__main__":
    sys.exit(main())
