"""Comparisons that were fixed before their test split was read: what is compared, on what, and how it is judged.

The paper's tables show whether orders agree with it; these studies are to decide. Every method has the same budget of
tuning (`tuning`), every claim is judged with the others of its study (`claims.judge_family`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .recipes import COMPODISTILL, KD, SFT
from .studies import Claim, Gap, Row, Study
from .world import World

CONTROL = replace(COMPODISTILL, flags=("--shuffle_attention_targets", "True"))
#: Points of accuracy within which the control counts as being at KD's level.
MARGIN = 10.0

EVIDENCE = Study(
    "evidence",
    "Evidence: does the teacher's attention to this image help?",
    {
        "teacher": Row("Teacher", None),
        "sft": Row("SFT", SFT),
        "kd": Row("KD", KD),
        "compodistill": Row("CompoDistill", COMPODISTILL),
        "control": Row("control: another image's attention", CONTROL),
    },
    (
        Claim("CompoDistill is ahead of KD", "compodistill", "kd", "relations"),
        Claim("CompoDistill is ahead of SFT", "compodistill", "sft", "relations"),
        Claim("CompoDistill is ahead of the control", "compodistill", "control", "relations"),
        Claim(f"the control is within {MARGIN:g} points of KD", "control", "kd", "relations", MARGIN),
    ),
    metrics=("relations", "cr", "relation_questions", "vqa", "similarity"),
    family=True,
    gap=Gap("relations", "sft", "teacher"),
    seeds=8,
    curve=5,
    note="Relation types are swap_obj and replace_rel: the set of objects does not give their answers away, and a "
    "model that ignores the image scores 50 %. What would refute the method here: CompoDistill not ahead of KD, or "
    "not ahead of the control, which has the same loss and another image's targets.",
)

STUDIES = {study.name: study for study in (EVIDENCE,)}


def curve_sections(
    studies: Sequence[Study], runs: Mapping[tuple[str, int], Any], world: World, seeds: Sequence[int], root: Path
) -> list[str]:
    """Accuracy over steps, drawn for the studies whose runs have it: sections of a report."""
    sections = []
    for study in studies:
        found: dict[str, list[list[list[float]]]] = {}
        for row in study.rows.values():
            if not study.curve or row.recipe is None:
                continue
            records = [runs.get((world.normal(row.recipe).key, seed)) for seed in seeds]
            curves = [record["curve"] for record in records if record and record.get("curve")]
            if curves:
                found[row.label] = curves
        if not found:
            continue
        from ..analysis.plots import draw_curves

        path = draw_curves(found, "relation types, validation split (%)", 50.0, root / f"{study.name}-curves.png")
        title = study.title.split(": ", 1)[0]
        sections.append(f"## {title}: accuracy over steps\n\n![{title}: accuracy over steps]({path.name})\n")
    return sections
