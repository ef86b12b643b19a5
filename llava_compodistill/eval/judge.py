"""A judge of open answers: a model of natural-language inference, which tells whether one text entails another.

Reefknot's authors judge so ("bidirectional entailment"), with a DeBERTa that they have not published. Any classifier
of the kind will do that transformers can load; its name stands in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hosts.files import read_object
from .records import RecordFile, fingerprint, weights_of

RULE = "right where the judge's likeliest class is entailment both from the answer to the label and back"
_BATCH = 32


@dataclass(frozen=True)
class Verdicts:
    """What a judge has decided.

    Attributes:
        judge: its name, weights and rule, for the summary.
        by_id: record -> right or wrong; records without one are none that it was asked about.
    """

    judge: dict[str, Any]
    by_id: dict[str, bool] = field(default_factory=dict)

    def of(self, key: str) -> dict[str, bool]:
        """The field `verdict` of a record, or nothing."""
        return {"verdict": self.by_id[key]} if key in self.by_id else {}


def check_judge(name: str) -> tuple[int, str]:
    """(number of the class "entailment", the model's commit on the hub if it is from there), from its config alone.

    Raises:
        DataError: when there is no such model, or it has no such class.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and what the hub's client raises
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"--judge {name}: no folder or name of a model that transformers can load ({reason})."
        ) from None
    labels = config.id2label
    found = [number for number, label in labels.items() if str(label).lower() == "entailment"]
    if len(found) != 1:
        raise DataError(
            f"--judge {name}: its classes are {', '.join(map(str, labels.values()))}; a model of natural-language "
            "inference has one called entailment."
        )
    return int(found[0]), getattr(config, "_commit_hash", None) or ""


def judge(
    name: str,
    asked: Sequence[tuple[str, str, str]],
    path: Path,
    device: str,
    progress: Callable[[int], None] = lambda answers: None,
) -> Verdicts:
    """Judge answers; verdicts are kept in a file, and what it holds is not judged again.

    Args:
        name: of the model, or its folder.
        asked: (id, answer, label) each. An empty answer is wrong.
        path: JSON lines of {id, verdict}.
        progress: called with the number of answers as they are judged.

    Raises:
        DataError: as `check_judge`, and when the model cannot be loaded.
        RecordsError: for verdicts of another judge or on other answers.
    """
    entailment, commit = check_judge(name)
    named = Path(name).name if Path(name).is_dir() else name  # owner/name on the hub, and its commit
    about = {"judge": named, "weights": weights_of(name) or commit, "rule": RULE}
    run = {**about, "fingerprint": fingerprint(asked)}
    # Verdicts on other answers, or another judge's, are made anew: answers are what was costly.
    with RecordFile(path, run, [key for key, *_ in asked], overwrite=not _same(path, run)) as records:
        left = [entry for entry in asked if entry[0] not in records.done]
        records.append({"id": key, "verdict": False} for key, answer, _ in left if not answer.strip())
        left = [entry for entry in left if entry[1].strip()]
        decide = _load(name, entailment, device) if left else None
        for start in range(0, len(left), _BATCH):
            batch = left[start : start + _BATCH]
            there = decide([(answer, label) for _, answer, label in batch])
            back = decide([(label, answer) for _, answer, label in batch])
            records.append(
                {"id": key, "verdict": one and other} for (key, *_), one, other in zip(batch, there, back, strict=True)
            )
            progress(len(batch))
        return Verdicts(about, {key: bool(record["verdict"]) for key, record in records.done.items()})


def _same(path: Path, run: dict[str, Any]) -> bool:
    """Whether the verdicts that lie there, if any, are of such a run."""
    try:
        return read_object(path.with_name(path.name + ".run.json")) == run
    except DataError:
        return False


def _load(name: str, entailment: int, device: str) -> Callable[[Sequence[tuple[str, str]]], list[bool]]:
    """Pairs of sentences -> whether each first one entails the second."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False).to(device).eval()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"--judge {name}: cannot be loaded ({reason}).") from None

    @torch.inference_mode()
    def decide(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        first, second = map(list, zip(*pairs, strict=True))
        batch = tokenizer(first, second, padding=True, truncation=True, return_tensors="pt").to(device)
        return (model(**batch).logits.float().argmax(dim=-1) == entailment).tolist()

    return decide
