"""The original evaluators' rules, each stated anew and held against ours, and where our stricter reading differs."""

from __future__ import annotations

import random
import string

import pytest

from llava_compodistill.eval import protocols
from llava_compodistill.eval.benchmarks import get, pope, rbench, reefknot, sugarcrepe
from llava_compodistill.eval.benchmarks.base import PAPER_MODELS
from llava_compodistill.eval.reading import (
    first_character,
    first_word_letter,
    letter,
    option,
    yes_or_no,
    yes_unless_no,
    yes_within,
)
from llava_compodistill.eval.summaries import official, table

pytestmark = pytest.mark.once  # nothing here depends on transformers

STRICT, OFFICIAL = protocols.LETTER_READINGS
#: Pieces of which answers are made up, so that every rule meets its borders.
PIECES = ["A", "B", "a", "b", "C", "c", "D", "Yes", "yes", "No", "no", "not", "Not", "eyes", "man", "(", ")", ".", ",",
          ":", "'", "_", "1", " ", "  ", "\n", "É", "the"]  # fmt: skip


def answers(count=3000, seed=0):
    rng = random.Random(seed)
    yield from ("", " ", "\n")
    for _ in range(count):
        yield "".join(rng.choice(PIECES) + rng.choice(["", "", " "]) for _ in range(rng.randrange(1, 7)))


# ---------------------------------------------------------------------------------------------------------------------
# SugarCrepe
# ---------------------------------------------------------------------------------------------------------------------
def authors_letter(text):
    """Upper-case; then the first A or B with no word character before or behind it."""
    text = text.upper()

    def word(place):
        return 0 <= place < len(text) and (text[place].isalnum() or text[place] == "_")

    for place, sign in enumerate(text):
        if sign in "AB" and not word(place - 1) and not word(place + 1):
            return "AB".index(sign)
    return None


def test_sugarcrepes_letter_is_the_authors():
    different = 0
    for text in answers():
        assert first_word_letter(text, 2) == authors_letter(text), text
        different += letter(text, 2) != authors_letter(text)
    assert different > 100  # the strict reading is another one


@pytest.mark.parametrize(
    ("text", "strict", "authors"),
    [("A", 0, 0), ("(B)", 1, 1), ("a man, so B", 1, 0), ("b.", None, 1), ("A's", None, 0), ("", None, None),
     ("It is option b: a dog", None, 1), ("Both", None, None), ("AB", None, None), ("A1", 0, None)],
)  # fmt: skip
def test_letters_that_the_two_readings_take_differently(text, strict, authors):
    assert (letter(text, 2), first_word_letter(text, 2)) == (strict, authors)


def choices(*texts):
    """An item of SugarCrepe that was answered in both orders."""
    orders = ([0, 1], [1, 0])
    made = [{"image": 0, "options": o, "picked": letter(t, 2), "text": t} for o, t in zip(orders, texts, strict=True)]
    return {"id": str(texts), "subset": "swap_obj", "choices": made}


def test_sugarcrepe_reports_both_readings_and_both_places():
    records = [choices("A", "B"), choices("b", "b"), choices("a dog", ""), choices("B", "A")]
    strict, authors = sugarcrepe.score(records), sugarcrepe.score(records, OFFICIAL)
    # True caption first: A is right. True caption second: B is right.
    assert (strict["pos_first"], strict["neg_first"], strict["overall"]) == (25, 25, 25)
    assert (authors["pos_first"], authors["neg_first"]) == (50, 50)
    assert authors["overall"] == authors["swap_obj"] == 50 and authors["pos_first_by_subset"] == {"swap_obj": 50}
    assert (strict["unparsable"], authors["unparsable"]) == (4, 1)
    likelihoods = [{"id": 0, "subset": "swap_obj", "scores": [[1], [0]]}]
    assert "pos_first" not in sugarcrepe.score(likelihoods)


def test_choices_may_be_as_long_as_the_authors_have_them():
    from llava_compodistill.eval.benchmarks.base import Item

    asked = protocols.requests(Item("1", ("i.jpg",), ("a", "b")), "choice")
    assert [request.max_new_tokens for request in asked] == [32, 32] and all(request.exact for request in asked)
    # The prompt, byte for byte.
    assert asked[1].prompt == (
        "Which caption best describes the image?\n(A) b\n (B) a\n"
        "Answer with the option's alphabet from the given choices directly."
    )


def test_there_is_a_template_of_the_release():
    from llava_compodistill.hosts.llava.conversations import prompt_under

    assert prompt_under("qwen_v1") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Yes and no
# ---------------------------------------------------------------------------------------------------------------------
def popes_answer(text):
    """POPE's evaluator, which LLaVA's and R-Bench's repeat."""
    if "." in text:
        text = text[: text.index(".")]
    words = "".join(sign for sign in text if sign != ",").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def test_popes_rule_is_popes():
    for text in answers():
        assert yes_unless_no(text) == (popes_answer(text) == "yes"), text
        expected = None if not text.split(".")[0].replace(",", "").strip() else popes_answer(text) == "yes"
        assert yes_or_no(text) is expected, text


def popes_figures(pairs):
    """Accuracy, precision, recall, F1 and share of yes of (answer, label), with R-Bench's 1e-5 below each fraction."""
    hits = sum(answer == label == "yes" for answer, label in pairs)
    answered, true = (sum(pair[place] == "yes" for pair in pairs) for place in (0, 1))
    precision, recall = hits / (answered + 1e-5), hits / (true + 1e-5)
    accuracy = sum(answer == label for answer, label in pairs) / len(pairs)
    return accuracy, precision, recall, 2 * precision * recall / (precision + recall + 1e-5), answered / len(pairs)


NAMES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@pytest.mark.parametrize("benchmark", [pope, rbench])
def test_empty_answers_are_yes_to_the_authors_and_wrong_to_us(benchmark):
    rng = random.Random(1)
    texts = [text for text in answers(300, seed=2)] + [""] * 40
    records = [
        {"id": n, "text": text, "label": rng.choice(["yes", "no"]), "category": n % 3, "lists": [n % 3]}
        for n, text in enumerate(texts)
    ]
    by_list = [[(popes_answer(r["text"]), r["label"]) for r in records if r["id"] % 3 == part] for part in range(3)]
    expected = [sum(column) / 3 for column in zip(*map(popes_figures, by_list), strict=True)]
    found = benchmark.score(records, benchmark.OFFICIAL)
    assert [found[name] / 100 for name in NAMES] == pytest.approx(expected, abs=3e-5)
    assert found["unparsable"] == 0
    strict = benchmark.score(records)
    assert strict["unparsable"] >= 40 and strict["accuracy"] < found["accuracy"]
    assert strict["yes_ratio"] < found["yes_ratio"]


def test_a_question_counts_as_often_as_a_list_names_it():
    records = [
        {"id": "1", "text": "Yes", "label": "yes", "lists": [1, 1, 2]},
        {"id": "2", "text": "No", "label": "yes", "lists": [1]},
        {"id": "3", "text": "Yes", "label": "no", "lists": [2, 2]},
    ]
    found = rbench.score(records)
    assert found["by_list"]["1"]["accuracy"] == pytest.approx(200 / 3) and found["by_list"]["1"]["items"] == 3
    assert found["by_list"]["2"]["accuracy"] == pytest.approx(100 / 3)
    assert float(rbench.sums(records).headline()) == pytest.approx(found["f1"])


# ---------------------------------------------------------------------------------------------------------------------
# Reefknot
# ---------------------------------------------------------------------------------------------------------------------
def test_reefknots_rules_are_reefknots():
    for text in answers():
        assert yes_within(text) == (text.upper().find("YES") >= 0), text
        first = text[0].upper() if text else ""
        assert first_character(text, 4) == (string.ascii_uppercase.find(first) if first and first in "ABCD" else None)


@pytest.mark.parametrize(
    ("text", "strict", "authors"),
    [("C", 2, 2), ("c. on", 2, 2), ("(C)", 2, None), ("(c) on", 2, None), ("c", 2, 2), ("C. a dog", 2, 2),
     ("", None, None), ("d) inside", 3, 3), ("Answer: B", 1, 0), ("bird", None, 1), ("a man is on D", 3, 0),
     (" b", 1, None), ("e.", None, None), ("on", None, None), ("B: into", 1, 1)],
)  # fmt: skip
def test_options_of_multiple_choice(text, strict, authors):
    assert (option(text, 4), first_character(text, 4)) == (strict, authors)


def item(task, text, label, **more):
    return {
        "id": f"{task}{text}{label}",
        "task": task,
        "relation_type": "cognitive",
        "text": text,
        "label": label,
        **more,
    }


def test_reefknot_by_both_readings():
    records = [
        item("yesno", "The eyes are open.", "yes"),  # "yes" within a word
        item("yesno", "Maybe", "no"),  # no yes to them, no no to us
        item("yesno", "", "no"),
        item("multichoice", "Answer: B", "A"),
        item("multichoice", "(C)", "C"),
        item("vqa", "on", "salad is on container."),
    ]
    strict, authors = reefknot.score(records), reefknot.score(records, reefknot.OFFICIAL)
    assert (strict["yesno"]["accuracy"], authors["yesno"]["accuracy"]) == (pytest.approx(100 / 3), 100)
    assert (strict["multichoice"]["accuracy"], authors["multichoice"]["accuracy"]) == (50, 50)
    assert (strict["yesno_f1"], authors["yesno_f1"]) == (pytest.approx(200 / 3), 100)
    assert float(reefknot.sums(records).headline()) == pytest.approx(strict["yesno_f1"])


# ---------------------------------------------------------------------------------------------------------------------
# SADE
# ---------------------------------------------------------------------------------------------------------------------
def test_a_category_of_sade_is_the_mean_of_its_sources():
    sade = get("sade")

    def hits(category, source, right, wrong):
        made = [{"category": category, "source": source, "scores": [[1], [0]]}] * right
        return made + [{"category": category, "source": source, "scores": [[1], [1]]}] * wrong

    records = (
        hits("relation", "VL-CheckList", 9, 1) + hits("relation", "ARO-VG", 1, 1) + hits("negate", "CREPE-VG", 1, 3)
    )
    records = [{"id": str(number), **record} for number, record in enumerate(records)]
    found = sade.score(records)
    assert found["relation"] == pytest.approx((90 + 50) / 2) and found["negate"] == 25
    assert found["by_source"]["relation"] == {"VL-CheckList": 90, "ARO-VG": 50}
    assert found["macro"] == pytest.approx((70 + 25) / 2)
    assert found["pooled"]["relation"] == pytest.approx(1000 / 12)
    assert found["macro_pooled"] == pytest.approx((1000 / 12 + 25) / 2)
    assert float(sade.sums(records).headline()) == pytest.approx(found["macro"])
    assert found["missing"] == ["comprehensive", "attribute", "atomic", "content"]


def test_a_source_of_sade_that_is_missing_is_said():
    sade = get("sade")
    records = [
        {"id": f"{category} {source}", "category": category, "source": source, "scores": [[2, 1], [0, 3]]}
        for category in ("comprehensive", "relation", "attribute", "atomic", "negate", "content")
        for source in ("one", "two")
    ]
    assert "missing" not in sade.score(records)
    less = [record for record in records if record["id"] not in ("content two", "negate two")]
    found = sade.score(less)
    assert found["missing"] == ["a second source of content"] and found["macro"] == 100  # negate has one source anyway
    unnamed = [{key: value for key, value in record.items() if key != "source"} for record in records]
    assert sade.score(unnamed)["by_source"]["content"] == {"": 100}
    assert len(sade.score(unnamed)["missing"]) == 3


# ---------------------------------------------------------------------------------------------------------------------
# What stands beside the paper's figures
# ---------------------------------------------------------------------------------------------------------------------
def summary(name, protocol, records):
    benchmark = get(name)
    made = {"benchmark": name, "protocol": protocol, "headline": benchmark.headline, "note": "", "items": len(records)}
    return made | benchmark.scored(records, protocol) | {"paper": benchmark.paper_figures(protocol)}


def test_beside_the_paper_stands_the_rule_of_its_evaluator():
    made = summary("sugarcrepe", "choice", [choices("b", "b")])
    assert made["value"] == 0 and official(made) == 50
    assert set(made["readings"]) == {"strict", "official"} and "any case" in made["readings"]["official"]["rule"]
    row = [list(column.cells)[0] for column in table([made], "x").columns]
    assert row == ["SugarCrepe", "overall", "choice", "0.0", "50.0", "83.0", "73.3", "82.9"]


@pytest.mark.parametrize("protocol", ["likelihood", "yes", "choice-logits"])
def test_a_figure_of_another_kind_stands_alone(protocol):
    made = summary("sugarcrepe", protocol, [{"id": 0, "subset": "swap_obj", "scores": [[1], [0]]}])
    assert made["paper"] == {} and made["readings"] == {}
    row = [list(column.cells) for column in table([made], "x").columns]
    assert [cells[0] for cells in row] == ["SugarCrepe", "overall", protocol, "", "100.0", "", "", ""]


def test_reefknots_rscore_has_no_paper_beside_it():
    records = [item("yesno", "yes", "yes"), item("multichoice", "A", "A"), item("vqa", "on", "is on", verdict=True)]
    made = summary("reefknot", "answer", records)
    rows = list(zip(*(column.cells for column in table([made], "x").columns), strict=True))
    assert rows[0] == ("Reefknot", "yesno_f1", "answer", "100.0", "100.0", "67.9?", "61.3?", "66.7?")
    assert rows[1] == ("", "rscore", "answer", "100.0", "", "", "", "")
    assert set(made["paper"]) == set(PAPER_MODELS)
    del records[-1]["verdict"]
    rows = list(
        zip(*(column.cells for column in table([summary("reefknot", "answer", records)], "x").columns), strict=True)
    )
    assert len(rows) == 1


def test_every_reading_has_a_rule_and_official_ones_the_name():
    from llava_compodistill.eval.benchmarks import registered

    for benchmark in registered().values():
        names = [reading.name for reading in benchmark.readings]
        assert names in ([], ["strict", "official"]), benchmark.name
        assert all(reading.rule for reading in benchmark.readings)
