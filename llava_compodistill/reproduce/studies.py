"""The paper's tables of methods and ablations (arXiv 2510.12184), a row a recipe, with the paper's figures.

`paper` holds what the paper measured, VQA and CR averages in %. `claims` are its statements about the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .recipes import COMPODISTILL, KD, SFT, Recipe


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: as in the paper.
        recipe: None for the teacher itself.
        paper: the paper's figures by metric, vqa and cr.
    """

    label: str
    recipe: Recipe | None
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: on `metric`, the row `better` is ahead of the row `worse`."""

    text: str
    better: str
    worse: str
    metric: str = "cr"


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        name: what the command calls it.
        title: what it shows.
        rows: by a short name.
        note: what differs in the miniature world.
    """

    name: str
    title: str
    rows: Mapping[str, Row]
    claims: tuple[Claim, ...] = ()
    note: str = ""


def _paper(vqa: float, cr: float) -> dict[str, float]:
    return {"vqa": vqa, "cr": cr}


FULL = _paper(62.9, 66.7)
#: The rivals train an ordinary adapter.
_PLAIN = {"projector": "mlp2x_gelu", "vat": False}
LLAVA_KD = Recipe(method="llava_kd", stages=("dpt", "sft", "dft"), **_PLAIN)
LLAVADI = Recipe(method="llavadi", stages=("pt", "dft"), **_PLAIN)
ALIGN_KD = Recipe(method="align_kd", stages=("dpt", "dft"), **_PLAIN)
SWITCH_KD = Recipe(method="switch_kd", stages=("pt", "dft"), flags=("--unfreeze_mm_vision_tower", "True"), **_PLAIN)
RELEASE = Recipe(method="release")

TABLE_1 = Study(
    "table1",
    "Table 1: methods, one teacher and one student",
    {
        "teacher": Row("Teacher", None, _paper(62.6, 70.3)),
        "sft": Row("SFT", SFT, _paper(54.9, 60.7)),
        "kd": Row("KD (Table 2, row a)", KD, _paper(56.8, 62.9)),
        "llava_kd": Row("LLaVA-KD", LLAVA_KD, _paper(61.6, 61.5)),
        "llavadi": Row("LLaVADI", LLAVADI, _paper(56.6, 60.2)),
        "align_kd": Row("Align-KD (not in the paper)", ALIGN_KD),
        "switch_kd": Row("Switch-KD (not in the paper)", SWITCH_KD),
        "release": Row("CompoDistill, as the authors' code", RELEASE),
        "compodistill": Row("CompoDistill", COMPODISTILL, _paper(61.9, 66.7)),
    },
    (
        Claim("CompoDistill is ahead of SFT in compositional reasoning", "compodistill", "sft"),
        Claim("CompoDistill is ahead of LLaVA-KD in compositional reasoning", "compodistill", "llava_kd"),
        Claim("CompoDistill is ahead of LLaVADI in compositional reasoning", "compodistill", "llavadi"),
    ),
)

TABLE_2 = Study(
    "table2",
    "Table 2: VAT and TAF",
    {
        "a": Row("(a) neither", KD, _paper(56.8, 62.9)),
        "b": Row("(b) VAT", replace(COMPODISTILL, projector="mlp2x_gelu"), _paper(57.9, 65.0)),
        "c": Row("(c) TAF", replace(COMPODISTILL, vat=False), _paper(61.3, 63.8)),
        "d": Row("(d) VAT and TAF", COMPODISTILL, FULL),
    },
    (
        Claim("VAT helps without TAF", "b", "a"),
        Claim("VAT helps with TAF", "d", "c"),
        Claim("TAF helps without VAT", "c", "a"),
        Claim("TAF helps with VAT", "d", "b"),
    ),
)

TABLE_3A = Study(
    "table3a",
    "Table 3a: the distance between attention maps",
    {
        "none": Row("none", replace(COMPODISTILL, vat=False), _paper(61.3, 63.8)),
        "mse": Row("MSE", replace(COMPODISTILL, flags=("--attention_loss", "mse")), _paper(60.3, 65.2)),
        "kl": Row("KL divergence", replace(COMPODISTILL, flags=("--attention_loss", "kl")), _paper(60.7, 65.5)),
        "cosine": Row("cosine", COMPODISTILL, FULL),
    },
    (
        Claim("any attention loss helps: MSE", "mse", "none"),
        Claim("any attention loss helps: KL", "kl", "none"),
        Claim("cosine is ahead of MSE", "cosine", "mse"),
        Claim("cosine is ahead of KL", "cosine", "kl"),
    ),
)


def _band(name: str) -> Recipe:
    return replace(COMPODISTILL, flags=("--student_layers", name, "--teacher_layers", name))


TABLE_3B = Study(
    "table3b",
    "Table 3b: the layers that are aligned",
    {
        "early": Row("early (below 30 %)", _band("early"), _paper(61.2, 63.7)),
        "later": Row("later (70 % and above)", _band("later"), _paper(61.7, 64.6)),
        "all": Row("all", _band("all"), _paper(62.4, 66.6)),
        "intermediate": Row("intermediate", _band("intermediate"), FULL),
    },
    (
        Claim("intermediate layers are ahead of early ones", "intermediate", "early"),
        Claim("intermediate layers are ahead of later ones", "intermediate", "later"),
    ),
    note="The miniature's teacher reads the image in its first layer (`miniature layers`), and the other tables align "
    "the early layers there.",
)


def _matching(name: str) -> Recipe:
    # Models of equal depth leave nothing to match: the student of this table is shallower, and all layers are aligned.
    return replace(_band("all"), flags=(*_band("all").flags, "--layer_matching", name), student="shallow")


TABLE_3C = Study(
    "table3c",
    "Table 3c: how student layers meet teacher layers",
    {
        "simple": Row("simple", _matching("simple"), _paper(61.5, 65.6)),
        "adaptive": Row("adaptive", _matching("adaptive"), _paper(62.0, 65.7)),
        "group": Row("group", _matching("group"), FULL),
    },
    (
        Claim("group matching is ahead of simple matching", "group", "simple"),
        Claim("group matching is ahead of adaptive matching", "group", "adaptive"),
    ),
    note="In the miniature a student of four layers learns from the teacher's six, all layers aligned: its usual "
    "student is as deep as the teacher, which leaves nothing to match.",
)

TABLE_5 = Study(
    "table5",
    "Table 5: the amount of data",
    {
        "sft": Row("SFT, half the data", replace(SFT, data=0.5), _paper(56.6, 60.7)),
        "half": Row("CompoDistill, half the data", replace(COMPODISTILL, data=0.5), FULL),
        "whole": Row("CompoDistill, all of it", COMPODISTILL, _paper(63.3, 69.9)),
    },
    (Claim("twice the data helps", "whole", "half"),),
)

TABLE_6 = Study(
    "table6",
    "Table 6: the size of the teacher",
    {
        "sft": Row("SFT", SFT, _paper(56.6, 60.7)),
        "small": Row("CompoDistill, smaller teacher", replace(COMPODISTILL, teacher="small"), FULL),
        "large": Row("CompoDistill, larger teacher", COMPODISTILL, _paper(63.4, 67.8)),
    },
    (Claim("a larger teacher makes a better student", "large", "small"),),
)

TABLE_7 = Study(
    "table7",
    "Table 7: another family of language models",
    {
        "sft": Row("SFT, Llama", replace(SFT, student="llama"), _paper(49.7, 43.7)),
        "compodistill": Row(
            "CompoDistill, Llama", replace(COMPODISTILL, student="llama", teacher="llama"), _paper(53.1, 48.9)
        ),
    },
    (Claim("CompoDistill is ahead of SFT with another backbone", "compodistill", "sft"),),
)


def _stages(*stages: str) -> Recipe:
    return replace(COMPODISTILL, stages=stages)


TABLE_14 = Study(
    "table14",
    "Table 14: the stages and their order",
    {
        "1": Row("(1) PT + SFT", _stages("pt", "sft"), _paper(56.6, 60.7)),
        "2": Row("(2) PT + DFT", _stages("pt", "dft"), _paper(59.6, 64.6)),
        "3": Row("(3) DPT + SFT", _stages("dpt", "sft"), _paper(60.4, 60.6)),
        "4": Row("(4) DPT + DFT", _stages("dpt", "dft"), _paper(21.6, 59.7)),
        "5": Row("(5) DPT + SFT + DFT", _stages("dpt", "sft", "dft"), _paper(60.6, 65.3)),
        "full": Row("(*) DPT + DFT + SFT", COMPODISTILL, FULL),
    },
    (
        Claim("DPT helps before SFT", "3", "1", "vqa"),
        Claim("DFT helps after PT", "2", "1"),
        Claim("without SFT, VQA collapses", "full", "4", "vqa"),
        Claim("SFT last is ahead of DFT last", "full", "5"),
        Claim("three stages are ahead of PT + DFT", "full", "2"),
    ),
)

STUDIES = {
    study.name: study
    for study in (TABLE_1, TABLE_2, TABLE_3A, TABLE_3B, TABLE_3C, TABLE_5, TABLE_6, TABLE_7, TABLE_14)
}
