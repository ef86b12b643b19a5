"""The paper's tables of methods and ablations (arXiv 2510.12184), a row a recipe, with the paper's figures.

`paper` holds what the paper measured, VQA and CR averages in %. `claims` are its statements about the rows. Tables 10
to 13 and 15 to 17 of its appendix give the same rows by benchmark (`ALIASES`).
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
        paper: the paper's figures by metric: vqa and cr, or the study's own `metrics`.
        teacher: which of a world's teachers, where there is no recipe.
    """

    label: str
    recipe: Recipe | None
    paper: Mapping[str, float] = field(default_factory=dict)
    teacher: str = "default"


@dataclass(frozen=True)
class Claim:
    """A statement about rows, of the paper or one of ours: on `metric`, the row `better` is ahead of the row `worse`.

    Attributes:
        margin: points; with one, the statement is another: the two rows differ by less than this.
    """

    text: str
    better: str
    worse: str
    metric: str = "cr"
    margin: float | None = None


@dataclass(frozen=True)
class Gap:
    """How much of the way from the row `bottom` to the row `top` each row has gone, on `metric`."""

    metric: str
    bottom: str
    top: str


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        name: what the command calls it.
        title: what it shows.
        rows: by a short name.
        note: what the table is about, and what differs in the miniature world.
        metrics: shown in place of a world's usual ones, where it has them.
        family: the claims are judged together: their p-values are corrected for their number (Holm).
        gap: shown as a column.
        seeds: how many are trained where the command names none.
        tuned_as: a row whose tuning holds for all rows that distil, where they are variants of it; each is tuned by
            itself when empty.
        curve: at how many points of its main stage a student is evaluated, where a world does that.
    """

    name: str
    title: str
    rows: Mapping[str, Row]
    claims: tuple[Claim, ...] = ()
    note: str = ""
    metrics: tuple[str, ...] = ()
    family: bool = False
    gap: Gap | None = None
    seeds: int = 3
    tuned_as: str = ""
    curve: int = 0


def _paper(vqa: float, cr: float) -> dict[str, float]:
    return {"vqa": vqa, "cr": cr}


FULL = _paper(62.9, 66.7)
#: The rivals train an ordinary adapter.
_PLAIN = {"projector": "mlp2x_gelu", "vat": False}
LLAVA_KD = Recipe(method="llava_kd", stages=("dpt", "sft", "dft"), **_PLAIN)
LLAVADI = Recipe(method="llavadi", stages=("pt", "dft"), **_PLAIN)
LLAVA_MOD = Recipe(method="llava_mod", stages=("pt", "d2d", "d2s"), **_PLAIN)
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
        "llava_mod": Row("LLaVA-MoD", LLAVA_MOD, _paper(58.9, 62.6)),
        "align_kd": Row("Align-KD (not in the paper)", ALIGN_KD),
        "switch_kd": Row("Switch-KD (not in the paper)", SWITCH_KD),
        "release": Row("CompoDistill, as the authors' code", RELEASE),
        "compodistill": Row("CompoDistill", COMPODISTILL, _paper(61.9, 66.7)),
    },
    (
        Claim("CompoDistill is ahead of SFT in compositional reasoning", "compodistill", "sft"),
        Claim("CompoDistill is ahead of LLaVA-KD in compositional reasoning", "compodistill", "llava_kd"),
        Claim("CompoDistill is ahead of LLaVADI in compositional reasoning", "compodistill", "llavadi"),
        Claim("CompoDistill is ahead of LLaVA-MoD in compositional reasoning", "compodistill", "llava_mod"),
    ),
    note="The paper's VQA average of this table is over VQAv2, VizWiz, GQA, TextVQA and MME; those of the other "
    "tables, and of KD here, are over the last three. LLaVA-MoD is trained on the same data as the others and without "
    "its preference step, which needs pairs of answers (scripts/llava_mod.sh has it).",
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
    note="The miniature's teacher was trained to read the image in its middle layers (`miniature layers`).",
)


def _matching(name: str) -> Recipe:
    return replace(COMPODISTILL, flags=("--layer_matching", name))


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
    note="In the miniature a student of four layers learns from the teacher's eight, all layers aligned: the bands of "
    "its usual student and of the teacher have equally many layers, which leaves nothing to match.",
)


def _hallucination(rbench: float, reefknot: float) -> dict[str, float]:
    return {"rbench": rbench, "reefknot": reefknot}


TABLE_4 = Study(
    "table4",
    "Table 4: hallucinated relations",
    {
        "teacher": Row("Teacher", None, _hallucination(79.1, 67.9)),
        "sft": Row("SFT", SFT, _hallucination(74.3, 61.3)),
        "llava_kd": Row("LLaVA-KD", LLAVA_KD, _hallucination(76.5, 60.3)),
        "llava_mod": Row("LLaVA-MoD", LLAVA_MOD, _hallucination(76.2, 63.4)),
        "compodistill": Row("CompoDistill", COMPODISTILL, _hallucination(78.6, 66.7)),
    },
    tuple(
        Claim(f"CompoDistill is ahead of {label}", "compodistill", worse, metric)
        for metric in ("rbench", "reefknot", "relation_questions")
        for label, worse in (("SFT", "sft"), ("LLaVA-KD", "llava_kd"), ("LLaVA-MoD", "llava_mod"))
    ),
    note="R-Bench: F1 on the image level; Reefknot: Rscore. Table 13 of the paper, which holds the parts, prints 67.9 "
    "for CompoDistill on Reefknot. The miniature asks questions on relations instead.",
    metrics=("rbench", "reefknot", "relation_questions"),
)

TABLE_5 = Study(
    "table5",
    "Table 5: the amount of data",
    {
        "sft": Row("SFT, half the data", replace(SFT, data=0.5, mix="doubled"), _paper(56.6, 60.7)),
        "half": Row("CompoDistill, half the data", replace(COMPODISTILL, data=0.5, mix="doubled"), FULL),
        "whole": Row("CompoDistill, all of it", replace(COMPODISTILL, mix="doubled"), _paper(63.3, 69.9)),
    },
    (
        Claim("CompoDistill is ahead of SFT on the same data", "half", "sft"),
        Claim("twice the data helps", "whole", "half"),
    ),
    note="1.2M and 2.4M samples in the paper. With full-size models, half the data is LLaVA-mix-665K, and all of it "
    "the mix of Table 9; in the miniature both are conversations of one kind, seen for equal numbers of steps.",
)


def _sizes(student: str, teacher: str) -> Recipe:
    return replace(COMPODISTILL, student=student, teacher=teacher)


TABLE_6 = Study(
    "table6",
    "Table 6: the size of the teacher",
    {
        "sft": Row("SFT", SFT, _paper(56.6, 60.7)),
        "small": Row("CompoDistill, smaller teacher", _sizes("default", "small"), FULL),
        "large": Row("CompoDistill, larger teacher", _sizes("default", "large"), _paper(63.4, 67.8)),
        "sft_small": Row("SFT, smaller student", replace(SFT, student="small"), _paper(52.0, 48.4)),
        "small_small": Row("the same, smaller teacher", _sizes("small", "small"), _paper(54.7, 51.1)),
        "small_large": Row("the same, larger teacher", _sizes("small", "large"), _paper(56.6, 54.5)),
    },
    (
        Claim("a larger teacher makes a better student", "large", "small"),
        Claim("a larger teacher makes a better small student", "small_large", "small_small"),
        Claim("a small student gains from a teacher", "small_small", "sft_small"),
    ),
    note="The paper's student of 1.8B learns from 4B and from 7B (Qwen2.5), its student of 0.5B from 1.8B and 4B. "
    "In the miniature the larger teacher is the usual one.",
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


TABLE_9 = Study(
    "table9",
    "Table 9: data from several sources",
    {
        "base": Row("LLaVA-mix-665K", COMPODISTILL, FULL),
        "scaled": Row("with the additional data", replace(COMPODISTILL, mix="scaled"), _paper(63.3, 69.9)),
    },
    (Claim("more kinds of data help", "scaled", "base"),),
    note="Table 9 lists the data, Table 5 has the figures. DFT and SFT take the mix; DPT keeps its captions (the "
    "paper names no stage). With full-size models, `data.scaled` of the world file names the mix. In the miniature, a "
    "second file of as many new images stands for the additional data: long captions, questions on colours, shapes, "
    "numbers and places; all students see equal numbers of steps.",
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


def _vat(*flags: str) -> Recipe:
    return replace(COMPODISTILL, flags=flags)


VAT = Study(
    "vat",
    "VAT: what the paper leaves open",
    {
        "all": Row("all queries, each row, mean of the heads (default)", COMPODISTILL, FULL),
        "visual": Row("visual queries", _vat("--attention_rows", "visual")),
        "text": Row("text queries", _vat("--attention_rows", "text")),
        "answer": Row("queries that predict the answer", _vat("--attention_rows", "answer")),
        "matrix": Row("the matrix as one vector", _vat("--attention_similarity", "matrix")),
        "matched": Row("head by head, matched", _vat("--attention_heads", "matched")),
        "shuffled": Row("control: another image's attention", _vat("--shuffle_attention_targets", "True")),
    },
    (Claim("the right image's attention helps", "all", "shuffled"),),
    note="The paper's equation leaves queries and cosine open, and names heads as future work (Appendix J). "
    "`release` in table1 is what the authors' code does.",
)

STUDIES = {
    study.name: study
    for study in (
        *(TABLE_1, TABLE_2, TABLE_3A, TABLE_3B, TABLE_3C, TABLE_4, TABLE_5, TABLE_6, TABLE_7, TABLE_9, TABLE_14),
        VAT,
    )
}
#: The appendix's tables of the same rows.
ALIASES = {
    "table10": "table3a",
    "table11": "table3b",
    "table12": "table3c",
    "table13": "table4",
    "table15": "table5",
    "table16": "table6",
    "table17": "table7",
}
