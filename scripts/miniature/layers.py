"""`llava-compodistill miniature layers`: where the teacher of a run reads the image."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llava_compodistill.about import environment
from llava_compodistill.record.sight import blind_in

from .evaluate import Scores, evaluate, load_for_evaluation

console = Console()


def main(run: Path, checkpoint: Path | None, split: str) -> int:
    """Evaluate a checkpoint (the run's teacher by default) without sight in each layer, and with sight in it alone;
    print a table and write RUN/layers-SPLIT.json."""
    checkpoint = checkpoint or run / "models" / "llava-teacher"
    for path in (run / "data" / "manifest.json", checkpoint / "config.json"):
        if not path.is_file():
            console.print(f"{path} is missing: `llava-compodistill miniature quickstart` makes such a run.")
            return 2
    model, tokenizer = load_for_evaluation(checkpoint)
    every = range(model.config.num_hidden_layers)
    blind: dict[str, list[int]] = {"whole model": []}
    blind |= {f"without layer {layer}": [layer] for layer in every}
    blind |= {f"layer {layer} alone": [other for other in every if other != layer] for layer in every}
    found: dict[str, dict[str, Any]] = {}
    title = f"Accuracy in % where text sees the image in some layers only: {checkpoint.name}, {split}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "recogn.", "relation", "compos.", "rel. types"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, layers in track(blind.items(), "evaluating", console=console, transient=True):
        scores: Scores = evaluate(model, tokenizer, run / "data", split, inside=blind_in(model, layers))
        found[name] = scores.as_dict()
        row = scores.recognition, scores.relation, mean(scores.compositional.values()), scores.relation_types
        table.add_row(name, *(f"{100 * value:.1f}" for value in row), end_section=layers in ([], [every[-1]]))
    console.print(table)
    path = run / f"layers-{split}.json"
    record = {"checkpoint": str(checkpoint), "environment": environment(), "scores": found}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"figures: {path}")
    return 0
