"""Figures that several benchmarks share, from records: pure functions over dicts, usable on any model's records.

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean as mean_of
from typing import Any

from ...errors import RecordError
from ..reading import Reading, letter_is_doubtful, yes_or_no

Record = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Captions matched with images
# ---------------------------------------------------------------------------------------------------------------------
def pair_accuracy(record: Record, reading: Reading | None = None) -> float:
    """Whether the true caption (0) beats every other on image 0; over `choices`, the share of orders that pick it.

    Args:
        reading: as for `picked_letter`.
    """
    if "scores" in record:
        true, *false = (row[0] for row in _scores(record))
        return float(all(true > other for other in false))
    return mean_of(choice_is_right(choice, reading) for choice in choices(record))


def choice_is_right(choice: Record, reading: Reading | None = None) -> float:
    """Whether one of `choices` picks the image's own caption."""
    picked = picked_letter(choice, reading)
    return float(picked is not None and choice["options"][picked] == choice.get("image", 0))


def picked_letter(choice: Record, reading: Reading | None = None) -> int | None:
    """The number of the letter that one of `choices` picked, None where there is none.

    Args:
        reading: reads it anew, where the model answered in words.
    """
    if reading is None or "text" not in choice:
        return choice["picked"]
    return reading.letter(choice["text"], len(choice["options"]))


def two_by_two(record: Record) -> tuple[bool, bool, bool, bool]:
    """Image 0 prefers its caption, image 1 its, caption 0 prefers its image, caption 1 its."""
    (s00, s01), (s10, s11) = _scores(record)
    return s00 > s10, s11 > s01, s00 > s01, s11 > s10


def _scores(record: Record) -> list[list[float]]:
    """[captions][images]; raises RecordError for NaN, which is neither more nor less than anything, and for what is
    no number at all."""
    scores = field(record, "scores")
    rows = scores if isinstance(scores, list) else [scores]
    if not all(isinstance(row, list) and all(map(_is_number, row)) for row in rows):
        raise RecordError(f"record {record.get('id')}: scores must be [captions][images], are {scores!r:.80}")
    if any(value != value for row in scores for value in row):
        raise RecordError(f"record {record.get('id')}: scores hold NaN: {scores}")
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choices(record: Record) -> list[Record]:
    """The `choices` of a record; raises RecordError where one is none."""
    found = field(record, "choices")
    for choice in found if isinstance(found, list) else [found]:
        options = choice.get("options") if isinstance(choice, dict) else None
        known = isinstance(options, list) and all(isinstance(option, int) for option in options)
        # `picked` alone is read where the model was asked for likelihoods, and the text where it answered in words.
        picked = choice.get("picked") if known else None
        if not known or not (picked is None or (type(picked) is int and 0 <= picked < len(options))):
            raise RecordError(f"record {record.get('id')}: choices hold {choice!r:.80}, which is no choice of options")
        if not isinstance(choice.get("text", ""), str):
            raise RecordError(f"record {record.get('id')}: the text of a choice must be a text, is {choice!r:.80}")
    return found


def pairwise(record: Record, reading: Reading | None = None) -> float:
    """The share of an item's two image-to-text choices that are right."""
    return mean_of(map(float, two_by_two(record)[:2])) if "scores" in record else pair_accuracy(record, reading)


def four_way(records: Sequence[Record], reading: Reading | None = None) -> dict[str, Any]:
    """`group`, `i2t`, `t2i` (chance 16.7 / 25 / 25), `pairwise` and the four one-sided accuracies (chance 50) of
    items of two captions and two images; `pairwise` alone of `choices`."""
    if all("scores" not in record for record in records):
        # Letters are chosen for one image at a time: text-to-image would need both images in one prompt.
        return {"pairwise": percent(pair_accuracy(record, reading) for record in records)}
    sides = [two_by_two(record) for record in records]
    names = ("i2t_image_0", "i2t_image_1", "t2i_caption_0", "t2i_caption_1")
    return {
        "group": percent(float(all(side)) for side in sides),
        "i2t": percent(float(side[0] and side[1]) for side in sides),
        "t2i": percent(float(side[2] and side[3]) for side in sides),
        "pairwise": percent(float(value) for side in sides for value in side[:2]),
        **{name: percent(float(side[index]) for side in sides) for index, name in enumerate(names)},
    }


def counts(records: Iterable[Record], reading: Reading | None = None) -> dict[str, int]:
    """How many items there are and, of `choices`, how many letters could not be read or may be an article."""
    records = list(records)
    made = [choice for record in records if "choices" in record for choice in choices(record)]
    found = {"items": len(records)}
    if made:
        read = [picked_letter(choice, reading) for choice in made]
        found["unparsable"] = read.count(None)
        found["doubtful_letters"] = sum(letter_is_doubtful(choice.get("text", "")) for choice in made)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Answers in words
# ---------------------------------------------------------------------------------------------------------------------
def yes_no_figures(records: Sequence[Record], read: Callable[[str], bool | None] = yes_or_no) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the share of "yes", in %; yes is the positive answer.

    Args:
        read: answer -> yes, no, or None where it is neither, and wrong.
    """
    pairs = [(read(answer(record)), is_yes(record)) for record in records]
    hits = sum(answer is True and label for answer, label in pairs)
    answered, true = sum(answer is True for answer, _ in pairs), sum(label for _, label in pairs)
    precision, recall = _ratio(hits, answered), _ratio(hits, true)
    return {
        "f1": _ratio(2 * precision * recall, 100 * (precision + recall)),
        "accuracy": _ratio(sum(answer is label for answer, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _ratio(answered, len(pairs)),
        "items": len(pairs),
    }


def means_of_yes_no(lists: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The means over several `yes_no_figures`."""
    entries = list(lists)
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    return {name: mean(entry[name] for entry in entries) for name in names}


def is_yes(record: Record) -> bool:
    """Whether a record's label is yes; raises RecordError when it is neither yes nor no."""
    label = str(field(record, "label")).strip().lower()
    if label not in ("yes", "no"):
        raise RecordError(f"record {record.get('id')}: label {record['label']!r} must be yes or no")
    return label == "yes"


def unparsable(records: Iterable[Record], reader: Callable[[str], Any]) -> int:
    """How many answers `reader` makes nothing of."""
    return sum(reader(answer(record)) is None for record in records)


def empty(records: Iterable[Record]) -> int:
    """How many answers hold nothing."""
    return unparsable(records, lambda text: text.strip() or None)


# ---------------------------------------------------------------------------------------------------------------------
# Fields and groups
# ---------------------------------------------------------------------------------------------------------------------
def field(record: Record, name: str) -> Any:
    """A field of a record; raises RecordError when it has none."""
    if name not in record:
        raise RecordError(f"record {record.get('id')}: has no {name!r}, only {', '.join(map(str, record))}")
    return record[name]


def answer(record: Record) -> str:
    """What the model answered, the field `text`; raises RecordError when it is no text."""
    found = field(record, "text")
    if not isinstance(found, str):
        raise RecordError(f"record {record.get('id')}: text must be a text, is {found!r:.60}")
    return found


def grouped(records: Iterable[Record], name: str, known: Sequence[str] | None = None) -> dict[str, list[Record]]:
    """Records by a field, in the order of the known values.

    Raises RecordError for a value that is not known.
    """
    groups: dict[str, list[Record]] = {value: [] for value in known or ()}
    for record in records:
        value = field(record, name)
        if known is not None and value not in list(known):  # a list: the value may be one that no dict takes
            raise RecordError(f"record {record.get('id')}: {name} {value!r} must be one of {', '.join(known)}")
        if isinstance(value, (list, dict)):
            raise RecordError(f"record {record.get('id')}: {name} must be a text, is {value!r:.60}")
        groups.setdefault(value, []).append(record)
    return {value: items for value, items in groups.items() if items}


def missing(found: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """{"missing": the known parts of which there is nothing}; empty when all is there, or nothing is."""
    present = set(found)
    names = [name for name in known if name not in present]
    return {"missing": names} if 0 < len(names) < len(known) else {}


def percent(values: Iterable[float]) -> float | None:
    """The mean in %, None of nothing."""
    values = list(values)
    return 100 * mean_of(values) if values else None


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return mean_of(values) if values else None


def _ratio(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
