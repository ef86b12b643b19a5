"""Reefknot (arXiv 2408.09429): questions on relations of three tasks: yes/no, multiple choice, open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingData
from ..reading import contains, letter, yes_or_no
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_of_means

FILES = {"yesno": "YESNO.jsonl", "multichoice": "Multichoice.jsonl", "vqa": "VQA.jsonl"}
TASKS = tuple(FILES)
HOW_TO_GET = "its files are at github.com/JackChen-seu/Reefknot, its images are Visual Genome's VG_100K and VG_100K_2."
#: Longest answers, in tokens; a letter may come after a few words.
MAX_NEW_TOKENS = {"yesno": 16, "multichoice": 16, "vqa": 64}
_READERS: dict[str, Callable[[str], Any]] = {
    "yesno": yes_or_no,
    "multichoice": lambda text: letter(text, 4),
    "vqa": lambda text: text.strip() or None,
}


def load(data: Path) -> list[Item]:
    """DATA/reefknot/{YESNO,Multichoice,VQA}.jsonl: {image_id, query_prompt, label, type, relation_type}; images
    VG_100K/ID.jpg or VG_100K_2/ID.jpg under DATA/reefknot or DATA/vg. Prompts repeat: an item is known by its line."""
    folder = data / "reefknot"
    roots = [root / name for root in (folder, data / "vg") for name in ("VG_100K", "VG_100K_2")]
    roots = [root for root in roots if root.is_dir()]
    if not roots:
        raise MissingData(f"{folder / 'VG_100K'} is missing: {HOW_TO_GET}")
    items = []
    for task, name in FILES.items():
        for number, (place, entry) in enumerate(files.read_lines(folder / name, HOW_TO_GET), start=1):
            file = f"{files.value(entry, 'image_id', place)}"
            file = file if Path(file).suffix else f"{file}.jpg"
            image = next((root / file for root in roots if (root / file).is_file()), roots[0] / file)
            label = files.yes_no_label(entry, place) if task == "yesno" else str(files.value(entry, "label", place))
            items.append(
                Item(
                    f"{task}-{number}",
                    (str(image),),
                    prompt=files.text(entry, "query_prompt", place),
                    fields={
                        "task": task,
                        "label": label,
                        "relation_type": str(files.value(entry, "relation_type", place)),
                    },
                    place=place,
                    max_new_tokens=MAX_NEW_TOKENS[task],
                )
            )
    return files.checked(items, "reefknot", HOW_TO_GET)


def score(records: Iterable[Record], judge: Callable[[str, str], bool] | None = None) -> dict[str, Any]:
    """`rscore`, the mean over the tasks of 1 - hallucination rate (the error rate), and each task's figures by type of
    relation.

    Args:
        judge: (answer, label) -> right, for the open questions; by default the label's words must stand in the answer.
    """
    records = list(records)
    tasks = figures.grouped(records, "task", TASKS)
    by_task: dict[str, Any] = {}
    for task, items in tasks.items():
        entry: dict[str, Any] = {}
        for relation, chosen in (("", items), *sorted(figures.grouped(items, "relation_type").items())):
            if task == "yesno":
                found = figures.yes_no_figures(chosen)
            else:
                accuracy = figures.percent(float(right(record, judge)) for record in chosen)
                found = {"accuracy": accuracy, "items": len(chosen)}
            entry |= found if not relation else {relation: found}
        entry["hallucination_rate"] = 100 - entry["accuracy"]
        entry["unparsable"] = figures.unparsable(items, _READERS[task])
        by_task[task] = entry
    return {
        "rscore": figures.mean(entry["accuracy"] for entry in by_task.values()),
        **by_task,
        "items": len(records),
        "unparsable": sum(entry["unparsable"] for entry in by_task.values()),
    }


def right(record: Record, judge: Callable[[str, str], bool] | None = None) -> bool:
    """Whether an item is right, by its task."""
    answer = figures.field(record, "text")
    if record["task"] == "yesno":
        return yes_or_no(answer) is figures.is_yes(record)
    if record["task"] == "multichoice":
        picked = letter(answer, 4)
        return picked is not None and chr(65 + picked) == str(figures.field(record, "label")).strip().upper()[:1]
    return (judge or contains)(answer, figures.field(record, "label"))


def sums(records: Sequence[Record]) -> Sums:
    """The mean over tasks."""
    return mean_of_means(records, lambda record: float(right(record)), lambda record: record["task"])


register(
    EngineBenchmark(
        name="reefknot",
        title="Reefknot",
        headline="rscore",
        load=load,
        protocols=("answer",),
        score=score,
        sums=sums,
        how_to_get=HOW_TO_GET,
        paper=(67.9, 61.3, 66.7),
    )
)
