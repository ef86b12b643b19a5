"""Benchmark figures from records: pure functions over dicts, usable on any model's records.

A record holds an item's `id`, what the item is (`subset`, `category`, `label`, …) and what the model made of it, in
one of three forms:

* ``scores``: [captions][images], how well each caption matches each image (log-probabilities, P("Yes"), …). Caption 0
  belongs to image 0 and caption 1, where there are two images, to image 1. A tie is wrong: every comparison is strict.
* ``choices``: one entry an order of the options, ``{"image": 0, "options": [1, 0], "picked": 0, "text": "A"}``: which
  captions were shown as A, B, …, and which of them was picked (None where no letter could be read).
* ``text``: what the model answered.

Figures are in %, with the number of items beside them; `unparsable` answers are wrong and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from ..errors import RecordError
from .reading import letter, letter_is_doubtful, says, short, yes_no_other, yes_or_no

Record = Mapping[str, Any]

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
SADE = ("comprehensive", "relation", "attribute", "atomic", "negate", "content")
REEFKNOT_TASKS = ("yesno", "multichoice", "vqa")
#: MME's tasks of perception and cognition (arXiv 2306.13394).
MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def sugarcrepe(records: Iterable[Record]) -> dict[str, Any]:
    """SugarCrepe (arXiv 2306.14610): accuracy by subset and their unweighted mean, `overall` (chance 50)."""
    subsets = _grouped(records, "subset", SUGARCREPE)
    figures = {name: _percent(map(pair_accuracy, items)) for name, items in subsets.items()}
    return {
        "overall": _mean(figures.values()),
        "micro": _percent(pair_accuracy(item) for items in subsets.values() for item in items),
        **figures,
        **_counts(record for items in subsets.values() for record in items),
    }


def sade(records: Iterable[Record]) -> dict[str, Any]:
    """SADE (arXiv 2308.10509): recall@1 of the true caption among its negatives, by category; `comprehensive` is
    Winoground's group score. `macro` averages the categories, `micro` the items; `missing` names categories of which
    there is nothing."""
    categories = _grouped(records, "category", SADE)
    figures = {name: _percent(map(_sade_hit, items)) for name, items in categories.items()}
    return {
        "macro": _mean(figures.values()),
        "macro_without_comprehensive": _mean(value for name, value in figures.items() if name != "comprehensive"),
        "micro": _percent(_sade_hit(item) for items in categories.values() for item in items),
        **figures,
        **_missing(categories, SADE),
        **_counts(record for items in categories.values() for record in items),
    }


def bivlc(records: Iterable[Record]) -> dict[str, Any]:
    """BiVLC (arXiv 2406.09952): `i2t`, `t2i` and `group` (chance 25 / 25 / 16.7), the four one-sided accuracies
    (chance 50), and `group` by the type of change."""
    records = list(records)
    figures = _four_way(records)
    for kind, items in sorted(_grouped((r for r in records if "type" in r), "type").items()):
        figures[f"group_{kind}"] = _four_way(items).get("group")
    return {**figures, **_counts(records)}


def winoground(records: Iterable[Record]) -> dict[str, Any]:
    """Winoground (arXiv 2204.03162): `text`, `image` and `group` (chance 25 / 25 / 16.7) and `pairwise`, the accuracy
    of the single image-to-text choices (chance 50), which alone compares with the paper's figure."""
    records = list(records)
    found = _four_way(records)
    figures = {"pairwise": found["pairwise"]}
    if "group" in found:
        figures |= {"text": found["i2t"], "image": found["t2i"], "group": found["group"]}
    return {**figures, **_counts(records)}


def rbench(records: Iterable[Record]) -> dict[str, Any]:
    """R-Bench (arXiv 2406.16449), image level: yes/no figures of each of the five lists (`lists` names those an item
    is in), and their means. An empty answer is wrong and no "yes"."""
    lists: dict[Any, list[Record]] = defaultdict(list)
    records = list(records)
    for record in records:
        for name in _field(record, "lists"):
            lists[name].append(record)
    by_list = {
        str(name): yes_no_figures(items) for name, items in sorted(lists.items(), key=lambda pair: str(pair[0]))
    }
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    figures = {name: _mean(entry[name] for entry in by_list.values()) for name in names}
    return {**figures, "by_list": by_list, "items": len(records), "unparsable": _unparsable(records, yes_or_no)}


def reefknot(records: Iterable[Record], judge: Callable[[str, str], bool] | None = None) -> dict[str, Any]:
    """Reefknot (arXiv 2408.09429): `rscore`, the mean over the tasks of 1 - hallucination rate (the error rate), and
    each task's figures by type of relation.

    Args:
        judge: (answer, label) -> right, for the open questions; by default the label's words must stand in the answer.
    """
    records = list(records)
    tasks = _grouped(records, "task", REEFKNOT_TASKS)
    figures: dict[str, Any] = {}
    accuracies = []
    for task, items in tasks.items():
        entry: dict[str, Any] = {}
        for relation, chosen in (("", items), *sorted(_grouped(items, "relation_type").items())):
            if task == "yesno":
                found = yes_no_figures(chosen)
            else:
                right = (float(_reefknot_right(record, judge)) for record in chosen)
                found = {"accuracy": _percent(right), "items": len(chosen)}
            entry |= found if not relation else {relation: found}
        entry["hallucination_rate"] = 100 - entry["accuracy"]
        entry["unparsable"] = _unparsable(items, _READERS[task])
        accuracies.append(entry["accuracy"])
        figures[task] = entry
    unparsable = sum(entry["unparsable"] for entry in figures.values())
    return {"rscore": _mean(accuracies), **figures, "items": len(records), "unparsable": unparsable}


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks of question answering, which LLaVA's modules ask
# ---------------------------------------------------------------------------------------------------------------------
def pope(records: Iterable[Record]) -> dict[str, Any]:
    """POPE (arXiv 2305.10355): yes/no figures of each `category` and their means. As LLaVA's eval_pope has them, but
    that an empty answer is wrong and no "yes"."""
    records = list(records)
    categories = {name: yes_no_figures(items) for name, items in sorted(_grouped(records, "category").items())}
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    figures = {name: _mean(entry[name] for entry in categories.values()) for name in names}
    by_category = {
        f"{name}_{category}": entry[name]
        for category, entry in categories.items()
        for name in ("f1", "accuracy", "yes_ratio")
    }
    return {**figures, **by_category, "items": len(records), "unparsable": _unparsable(records, yes_or_no)}


def gqa(records: Iterable[Record]) -> dict[str, Any]:
    """GQA (arXiv 1902.09506): the share of answers that are the label, both in the form of `reading.short`."""
    records = list(records)
    return {"accuracy": _percent(map(_gqa_right, records)), "items": len(records), "unparsable": _empty(records)}


def textvqa(records: Iterable[Record]) -> dict[str, Any]:
    """TextVQA (arXiv 1904.08920): the mean of the answers' `value`, the soft accuracy over ten people's answers that
    LLaVA's evaluator gives (`llava_records.textvqa`)."""
    records = list(records)
    values = [float(_field(record, "value")) for record in records]
    return {"accuracy": _percent(values), "items": len(records), "unparsable": _empty(records)}


def mme(records: Iterable[Record]) -> dict[str, Any]:
    """MME (arXiv 2306.13394): of each task the accuracy over questions plus the accuracy over images, both of whose
    questions have to be right (200 at most); `perception` and `cognition` are sums over tasks, `percent` is what
    perception has of its most; `missing` names tasks of which there is nothing. An image is known by its task and
    `image`."""
    records = list(records)
    tasks = _grouped(records, "category", (*MME_PERCEPTION, *MME_COGNITION))
    scores: dict[str, float] = {}
    for task, items in tasks.items():
        images = image_values(items)
        right, questions, both = (sum(image[place] for image in images) for place in (1, 2, 3))
        scores[task] = 100 * right / questions + 100 * both / len(images)
    perception = [score for task, score in scores.items() if task in MME_PERCEPTION]
    cognition = [score for task, score in scores.items() if task in MME_COGNITION]
    return {
        "percent": sum(perception) / (2 * len(perception)) if perception else None,
        "perception": sum(perception) if perception else None,
        "cognition": sum(cognition) if cognition else None,
        **scores,
        **_missing(scores, MME_PERCEPTION),
        "items": len(records),
        "unparsable": _unparsable(records, yes_no_other),
    }


def image_values(records: Iterable[Record]) -> list[tuple[str, int, int, bool]]:
    """MME's images: (task, questions answered rightly, questions, whether all are)."""
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for record in records:
        right = yes_no_other(_field(record, "text")) is _is_yes(record)
        images[_field(record, "category"), _field(record, "image")].append(right)
    return [(task, sum(values), len(values), all(values)) for (task, _), values in images.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Single records
# ---------------------------------------------------------------------------------------------------------------------
def pair_accuracy(record: Record) -> float:
    """Whether the true caption (0) beats every other on image 0; over `choices`, the share of orders that pick it."""
    if "scores" in record:
        true, *false = (row[0] for row in record["scores"])
        return float(all(true > other for other in false))
    return mean(float(_picked(choice) == choice.get("image", 0)) for choice in _field(record, "choices"))


def _sade_hit(record: Record) -> float:
    if record["category"] == "comprehensive":
        return float(all(_two_by_two(record)))
    return pair_accuracy(record)


def _reefknot_right(record: Record, judge: Callable[[str, str], bool] | None = None) -> bool:
    if record["task"] == "yesno":
        return yes_or_no(_field(record, "text")) is _is_yes(record)
    if record["task"] == "multichoice":
        return _letter_right(record)
    return (judge or says)(_field(record, "text"), _field(record, "label"))


def _gqa_right(record: Record) -> float:
    return float(short(_field(record, "text")) == short(_field(record, "label")))


def _picked(choice: Record) -> int | None:
    return None if choice["picked"] is None else choice["options"][choice["picked"]]


def _two_by_two(record: Record) -> tuple[bool, bool, bool, bool]:
    """Image 0 prefers its caption, image 1 its, caption 0 prefers its image, caption 1 its."""
    (s00, s01), (s10, s11) = _field(record, "scores")
    return s00 > s10, s11 > s01, s00 > s01, s11 > s10


def _four_way(records: Sequence[Record]) -> dict[str, Any]:
    if all("scores" not in record for record in records):
        # Letters are chosen for one image at a time: text-to-image would need both images in one prompt.
        return {"pairwise": _percent(map(pair_accuracy, records))}
    sides = [_two_by_two(record) for record in records]
    names = ("i2t_image_0", "i2t_image_1", "t2i_caption_0", "t2i_caption_1")
    return {
        "group": _percent(float(all(side)) for side in sides),
        "i2t": _percent(float(side[0] and side[1]) for side in sides),
        "t2i": _percent(float(side[2] and side[3]) for side in sides),
        "pairwise": _percent(float(value) for side in sides for value in side[:2]),
        **{name: _percent(float(side[index]) for side in sides) for index, name in enumerate(names)},
    }


def item_value(benchmark: str, record: Record) -> float:
    """What an item adds to its benchmark's headline, where that is a mean (of means) over items: in [0, 1].

    Raises ValueError for R-Bench and POPE, whose F1 is no mean over items, and MME, which counts images too.
    """
    if benchmark == "sugarcrepe":
        return pair_accuracy(record)
    if benchmark == "sade":
        return _sade_hit(record)
    if benchmark in ("bivlc", "winoground"):
        return mean(map(float, _two_by_two(record)[:2])) if "scores" in record else pair_accuracy(record)
    if benchmark == "reefknot":
        return float(_reefknot_right(record))
    if benchmark == "gqa":
        return _gqa_right(record)
    if benchmark == "textvqa":
        return float(_field(record, "value"))
    raise ValueError(f"benchmark {benchmark!r} has no value of single items")


# ---------------------------------------------------------------------------------------------------------------------
# Answers in words
# ---------------------------------------------------------------------------------------------------------------------
def _letter_right(record: Record) -> bool:
    label = str(_field(record, "label")).strip()
    options = len(record["options"]) if "options" in record else 4
    picked = letter(record["text"], options)
    return picked is not None and chr(65 + picked) == label.upper()[:1]


_READERS: dict[str, Callable[[str], Any]] = {
    "yesno": yes_or_no,
    "multichoice": lambda text: letter(text, 4),
    "vqa": lambda text: text.strip() or None,
}


def yes_no_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the share of "yes", in %; yes is the positive answer."""
    pairs = [(yes_or_no(_field(record, "text")), _is_yes(record)) for record in records]
    hits = sum(answer is True and label for answer, label in pairs)
    said, true = sum(answer is True for answer, _ in pairs), sum(label for _, label in pairs)
    precision, recall = _ratio(hits, said), _ratio(hits, true)
    return {
        "f1": _ratio(2 * precision * recall, 100 * (precision + recall)),
        "accuracy": _ratio(sum(answer is label for answer, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _ratio(said, len(pairs)),
        "items": len(pairs),
    }


def _is_yes(record: Record) -> bool:
    label = str(_field(record, "label")).strip().lower()
    if label not in ("yes", "no"):
        raise RecordError(f"record {record.get('id')}: label {record['label']!r} must be yes or no")
    return label == "yes"


# ---------------------------------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------------------------------
def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise RecordError(f"record {record.get('id')}: has no {name!r}, only {', '.join(map(str, record))}")
    return record[name]


def _grouped(records: Iterable[Record], field: str, known: Sequence[str] | None = None) -> dict[str, list[Record]]:
    """Records by a field, in the order of the known values.

    Raises RecordError for a value that is not known.
    """
    groups: dict[str, list[Record]] = {name: [] for name in known or ()}
    for record in records:
        value = _field(record, field)
        if known is not None and value not in groups:
            raise RecordError(f"record {record.get('id')}: {field} {value!r} must be one of {', '.join(known)}")
        groups.setdefault(value, []).append(record)
    return {name: items for name, items in groups.items() if items}


def _missing(found: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Nothing when all is there, or when nothing is."""
    names = [name for name in known if name not in set(found)]
    return {"missing": names} if 0 < len(names) < len(known) else {}


def _ratio(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def _percent(values: Iterable[float]) -> float | None:
    """The mean in %, None of nothing."""
    values = list(values)
    return 100 * mean(values) if values else None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return mean(values) if values else None


def _unparsable(records: Iterable[Record], reader: Callable[[str], Any]) -> int:
    return sum(reader(_field(record, "text")) is None for record in records)


def _empty(records: Sequence[Record]) -> int:
    return _unparsable(records, lambda text: text.strip() or None)


def _counts(records: Iterable[Record]) -> dict[str, int]:
    records = list(records)
    choices = [choice for record in records for choice in record.get("choices", ())]
    counts = {"items": len(records)}
    if choices:
        counts["unparsable"] = sum(choice["picked"] is None for choice in choices)
        counts["doubtful_letters"] = sum(letter_is_doubtful(choice.get("text", "")) for choice in choices)
    return counts
