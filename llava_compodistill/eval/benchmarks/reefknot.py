"""Reefknot (arXiv 2408.09429): questions on relations of three tasks: yes/no, multiple choice, open.

How right an open answer is, its authors' judge says, which they have not published. So there is no `rscore` unless a
judge is named (`--judge`), and what is compared with the paper's figure is the F1 of the yes/no questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingData
from ..reading import Reading, contains, first_character, option, yes_within
from . import figures, files, register
from .base import EngineBenchmark, Item, Record
from .sums import Sums, mean_f1

FILES = {"yesno": "YESNO.jsonl", "multichoice": "Multichoice.jsonl", "vqa": "VQA.jsonl"}
TASKS = tuple(FILES)
HOW_TO_GET = "its files are at github.com/JackChen-seu/Reefknot, its images are Visual Genome's VG_100K and VG_100K_2."
#: Longest answers, in tokens; a letter may come after a few words.
MAX_NEW_TOKENS = {"yesno": 16, "multichoice": 16, "vqa": 64}
_OPTIONS = 4
STRICT = Reading(
    "strict",
    "yes/no: no where the first sentence holds No, not or no, else yes, an empty answer is wrong; choice: an option's "
    'mark at the beginning ("c. on", "(C)"), else the first capital A to D that stands by itself',
    letter=option,
)
OFFICIAL = Reading(
    "official",
    "yes/no: yes where the answer holds the letters yes, else no; choice: the first character as a capital",
    yes_no=yes_within,
    letter=first_character,
)


def load(data: Path) -> list[Item]:
    """{YESNO,Multichoice,VQA}.jsonl in DATA/reefknot or its Dataset folder: {image_id, query_prompt, label, type,
    relation_type}; images VG_100K/ID.jpg or VG_100K_2/ID.jpg under DATA/reefknot, DATA/vg or DATA/VG_dataset. Prompts
    repeat: an item is known by its line."""
    home = files.home(data, "reefknot")
    folder = files.folder_with(FILES["yesno"], home, "Dataset")
    places = [place / inner for place in (home, data) for inner in ("", "VG_dataset", "vg")]
    roots = [place / name for place in places for name in ("VG_100K", "VG_100K_2") if (place / name).is_dir()]
    if not roots:
        raise MissingData(f"{home / 'VG_100K'} is missing: {HOW_TO_GET}")
    items = []
    for task, name in FILES.items():
        for number, (place, entry) in enumerate(files.read_lines(folder / name, HOW_TO_GET), start=1):
            file = f"{files.value(entry, 'image_id', place)}"
            file = file if Path(file).suffix else f"{file}.jpg"
            image = next((root / file for root in roots if (root / file).is_file()), roots[0] / file)
            label = files.yes_no_label(entry, place) if task == "yesno" else str(files.value(entry, "label", place))
            relation = str(files.value(entry, "relation_type", place))
            items.append(
                Item(
                    f"{task}-{number}",
                    (str(image),),
                    prompt=files.text(entry, "query_prompt", place),
                    fields={"task": task, "label": label, "relation_type": relation},
                    place=place,
                    max_new_tokens=MAX_NEW_TOKENS[task],
                )
            )
    return files.checked(items, "reefknot", HOW_TO_GET)


def score(records: Iterable[Record], reading: Reading = STRICT) -> dict[str, Any]:
    """`yesno_f1`, and each task's figures by type of relation; hallucination rates are error rates.

    An open answer is right where the judge has said so (the field `verdict`), and then `rscore` is the mean over the
    tasks of 1 - hallucination rate. Without a judge the label's words must stand in the answer, which is far stricter
    than what the authors report (the labels are sentences): that figure is called `rscore_verbatim`.
    """
    records = list(records)
    tasks = figures.grouped(records, "task", TASKS)
    by_task: dict[str, Any] = {}
    for task, items in tasks.items():
        entry: dict[str, Any] = {}
        for relation, chosen in (("", items), *sorted(figures.grouped(items, "relation_type").items())):
            if task == "yesno":
                found = figures.yes_no_figures(chosen, reading.yes_no)
            else:
                accuracy = figures.percent(float(right(record, reading)) for record in chosen)
                found = {"accuracy": accuracy, "items": len(chosen)}
            entry |= found if not relation else {relation: found}
        entry["hallucination_rate"] = 100 - entry["accuracy"]
        entry["unparsable"] = figures.unparsable(items, _reader(task, reading))
        by_task[task] = entry
    judged = "vqa" in tasks and all("verdict" in record for record in tasks["vqa"])
    return {
        "yesno_f1": by_task["yesno"]["f1"] if "yesno" in by_task else None,
        "rscore" if judged else "rscore_verbatim": figures.mean(entry["accuracy"] for entry in by_task.values()),
        **by_task,
        **figures.missing(by_task, TASKS),
        "items": len(records),
        "unparsable": sum(entry["unparsable"] for entry in by_task.values()),
    }


def _reader(task: str, reading: Reading) -> Callable[[str], Any]:
    if task == "yesno":
        return reading.yes_no
    if task == "multichoice":
        return lambda text: reading.letter(text, _OPTIONS)
    return lambda text: text.strip() or None


def right(record: Record, reading: Reading = STRICT) -> bool:
    """Whether an item is right, by its task."""
    answer = figures.answer(record)
    if record["task"] == "yesno":
        return reading.yes_no(answer) is figures.is_yes(record)
    if record["task"] == "multichoice":
        picked = reading.letter(answer, _OPTIONS)
        return picked is not None and chr(65 + picked) == str(figures.field(record, "label")).strip().upper()[:1]
    return bool(record["verdict"]) if "verdict" in record else contains(answer, figures.field(record, "label"))


def to_judge(records: Iterable[Record]) -> list[tuple[str, str, str]]:
    """(id, answer, label) of the open answers."""
    return [
        (record["id"], figures.answer(record), figures.field(record, "label"))
        for record in records
        if record["task"] == "vqa"
    ]


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """Why there is no rscore."""
    if "rscore_verbatim" not in figures:
        return []
    return [
        "No judge was given (--judge), so no rscore is reported. rscore_verbatim, in the summary, requires the "
        "label's words in the answer and is not comparable with published figures."
    ]


def sums(records: Sequence[Record]) -> Sums:
    """The F1 of the yes/no questions."""
    return mean_f1(
        [{**record, "label": str(record["label"]).lower()} for record in records],
        lambda record: ["yesno"] if record["task"] == "yesno" else [],
        lambda record: (record["task"] == "yesno", record["task"] == "yesno" and record["label"]),
    )


register(
    EngineBenchmark(
        name="reefknot",
        title="Reefknot",
        headline="yesno_f1",
        load=load,
        protocols=("answer",),
        score=score,
        sums=sums,
        readings=(STRICT, OFFICIAL),
        beside=("rscore",),
        remarks=remarks,
        judged=to_judge,
        how_to_get=HOW_TO_GET,
        paper=(67.9, 61.3, 66.7),
        paper_kind="unknown",
    )
)
