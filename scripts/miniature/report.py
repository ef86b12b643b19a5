"""What a run of the miniature experiment found: a table, the same as JSON, and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llava_compodistill.about import environment
from llava_compodistill.analysis.similarity import similarity

from . import pictures
from .evaluate import evaluate, load_for_evaluation, read_captions
from .language import KINDS
from .settings import VERSION, Settings, label


def evaluate_runs(
    settings: Settings,
    root: Path,
    runs: Sequence[dict[str, Any]],
    split: str,
    console: Console,
    again: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate the teacher and every student; each result is kept beside its checkpoint and read back next time,
    unless it is to be made `again`."""
    teacher_path = root / "models" / "llava-teacher"
    jobs = [{"method": "teacher", "seed": 0, "checkpoint": str(teacher_path), "steps": None, "seconds": None}, *runs]
    teacher: Any = None
    results = []
    for job in jobs:
        checkpoint = Path(job["checkpoint"])
        kept = checkpoint / f"evaluation-{split}.json"
        if again or not kept.is_file():
            with console.status(f"evaluating {job['method']}, seed {job['seed']}, on {split}"):
                if teacher is None:
                    teacher = load_for_evaluation(teacher_path)[0]
                kept.write_text(json.dumps(_evaluate(checkpoint, teacher, settings, root, split), indent=1) + "\n")
        results.append({**job, "scores": json.loads(kept.read_text(encoding="utf-8"))})
    return results


def _evaluate(checkpoint: Path, teacher: Any, settings: Settings, root: Path, split: str) -> dict[str, Any]:
    model, tokenizer = load_for_evaluation(checkpoint)
    scores = evaluate(model, tokenizer, root / "data", split).as_dict()
    captions = read_captions(root / "data", split)
    captions = captions[:: max(1, len(captions) // settings.similarity_captions)]
    alike = similarity(model, teacher, captions, tokenizer, version=VERSION, band=settings.band)
    return {**scores, "attention_similarity": alike.band, "similarity_by_layer": alike.by_layer}


def publish(results: list[dict[str, Any]], settings: Settings, root: Path, console: Console) -> None:
    """Write results.json and the pictures, and print the table."""
    record = {"environment": environment(), "settings": asdict(settings), "results": results}
    (root / "results.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    for table in tables(results):
        console.print(table)
    for path in pictures.draw_all(results, settings, root):
        console.print(f"picture: {path}", soft_wrap=True)
    console.print(f"figures: {root / 'results.json'}", soft_wrap=True)
    for result in results:
        what = f"checkpoint of {label(result['method'])}, seed {result['seed']}"
        console.print(f"{what}: {result['checkpoint']}", soft_wrap=True)


def tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Two tables that fit a terminal: the summary (`alike`: attention similarity to the teacher), and the types apart.

    One row a method: means over the seeds, with the standard deviation where there are several.
    """
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    summary = Table(title="Miniature world: accuracy in % (relations and compositional: chance 50)", **plain)
    names = ["", "recog.", "relation", "compos.", "unseen"]
    for name in [*names, "alike", "steps", "min."]:
        summary.add_column(name, justify="right" if name else "left", no_wrap=True)
    types = Table(title="Compositional, by type", **plain)
    for name in ["", *(kind.replace("_", "\n") for kind in KINDS)]:
        types.add_column(name, justify="right" if name else "left", no_wrap=True)
    for method in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == method]
        scores = [result["scores"] for result in mine]
        summary.add_row(
            label(method),
            percent([s["recognition"] for s in scores]),
            percent([s["relation"] for s in scores]),
            percent([s["compositional_mean"] for s in scores]),
            percent([s["unseen_mean"] for s in scores]),
            "-" if method == "teacher" else f"{mean(s['attention_similarity'] for s in scores):.3f}",
            "-" if mine[0]["steps"] is None else str(mine[0]["steps"]),
            "-" if mine[0]["seconds"] is None else f"{mean(r['seconds'] for r in mine) / 60:.1f}",
        )
        types.add_row(label(method), *(percent([s["compositional"][kind] for s in scores], 0) for kind in KINDS))
    return [summary, types]


def percent(values: Sequence[float], spread_digits: int = 1) -> str:
    """The mean in %, and with several seeds its standard deviation, in few enough characters for a terminal."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.{spread_digits}f}±{100 * stdev(values):.{spread_digits}f}"
