"""Benchmark scorers against figures worked out by hand, and the three answer sheets: perfect, inverted, coin flips."""

from __future__ import annotations

import random

import pytest

from llava_compodistill.errors import RecordError
from llava_compodistill.eval.benchmarks.sade import CATEGORIES
from llava_compodistill.eval.benchmarks.sugarcrepe import SUBSETS
from llava_compodistill.eval.reading import contains, letter, letter_is_doubtful, yes_or_no
from llava_compodistill.eval.scorers import bivlc, rbench, reefknot, sade, sugarcrepe, winoground

pytestmark = pytest.mark.once  # nothing here depends on transformers


def pair(subset, true, false, **more):
    return {"id": f"{subset}-{true}-{false}", "subset": subset, "scores": [[true], [false]], **more}


def test_sugarcrepe_by_hand():
    records = [
        pair("swap_obj", -1.0, -2.0),
        pair("swap_obj", -2.0, -1.0),
        pair("swap_obj", -1.0, -1.0),
    ]  # a tie: wrong
    records += [pair("add_att", 0.0, -5.0)]
    found = sugarcrepe(records)
    assert found["swap_obj"] == pytest.approx(100 / 3) and found["add_att"] == 100
    assert found["overall"] == pytest.approx((100 / 3 + 100) / 2)  # of subsets, not of items
    assert found["micro"] == 50 and found["items"] == 4
    assert "replace_rel" not in found and "unparsable" not in found


def test_sugarcrepe_choices_average_both_orders():
    def item(*picked, text="A"):
        orders = ([0, 1], [1, 0])
        choices = [{"options": o, "picked": p, "text": text} for o, p in zip(orders, picked, strict=True)]
        return {"id": "x", "subset": "replace_rel", "choices": choices}

    # Right in both orders; always A: right in one; nothing readable: wrong; wrong in both
    records = [item(0, 1), item(0, 0), item(None, None, text=""), item(1, 0)]
    found = sugarcrepe(records)
    assert found["replace_rel"] == pytest.approx(100 * (1 + 0.5 + 0 + 0) / 4)
    assert found["unparsable"] == 2 and found["doubtful_letters"] == 0


def test_sade_by_hand():
    records = [
        {"id": 1, "category": "content", "scores": [[3], [1], [2]]},
        {"id": 2, "category": "content", "scores": [[2], [1], [2]]},  # a tie with one of the negatives
        {"id": 3, "category": "negate", "scores": [[1], [0]]},
        {"id": 4, "category": "comprehensive", "scores": [[2, 1], [0, 3]]},
        {"id": 5, "category": "comprehensive", "scores": [[2, 3], [0, 4]]},  # caption 0 prefers image 1
        {"id": 6, "category": "comprehensive", "scores": [[2, 1], [0, 0.5]]},  # image 1 prefers caption 0
        {"id": 7, "category": "comprehensive", "scores": [[2, 1], [3, 4]]},  # image 0 prefers caption 1
    ]
    found = sade(records)
    assert (found["content"], found["negate"], found["comprehensive"]) == (50, 100, 25)
    assert found["macro"] == pytest.approx(175 / 3) and found["macro_without_comprehensive"] == 75
    assert found["micro"] == pytest.approx(100 * 3 / 7) and found["items"] == 7


MATRICES = [
    [[2, 1], [0, 3]],  # all right
    [[2, 3], [0, 4]],  # caption 0 prefers image 1: i2t right, t2i wrong
    [[2, 1], [3, 4]],  # image 0 prefers caption 1: i2t wrong, t2i right
    [[1, 1], [1, 1]],  # ties: nothing right
]


def test_bivlc_by_hand():
    records = [{"id": n, "type": "swap" if n else "add", "scores": m} for n, m in enumerate(MATRICES)]
    found = bivlc(records)
    assert (found["i2t"], found["t2i"], found["group"]) == (50, 50, 25)
    sides = [found[name] for name in ("i2t_image_0", "i2t_image_1", "t2i_caption_0", "t2i_caption_1")]
    assert sides == [50, 75, 50, 75]
    assert found["group_add"] == 100 and found["group_swap"] == 0


def test_winoground_by_hand():
    found = winoground({"id": n, "scores": m} for n, m in enumerate(MATRICES))
    assert (found["text"], found["image"], found["group"]) == (50, 50, 25)
    assert found["pairwise"] == pytest.approx(100 * 5 / 8)  # of the 8 image-to-text choices
    picks = [
        {"image": 0, "options": [0, 1], "picked": 0, "text": "A"},
        {"image": 1, "options": [0, 1], "picked": 0, "text": "A"},  # image 1 belongs to caption 1
        {"image": 1, "options": [1, 0], "picked": 0, "text": "A man on a horse"},
        {"image": 0, "options": [1, 0], "picked": None, "text": "neither"},
    ]
    found = winoground([{"id": 0, "choices": picks}])
    assert found == {"pairwise": 50, "items": 1, "unparsable": 1, "doubtful_letters": 1}


def answer(text, label, **more):
    return {"id": f"{text}/{label}", "text": text, "label": label, **more}


def test_rbench_by_hand():
    records = [
        answer("Yes, there is.", "yes", lists=[1, 2]),
        answer("No.", "yes", lists=[1]),
        answer("Yes", "no", lists=[1]),
        answer("No, it is not", "no", lists=[1]),
        answer("", "no", lists=[1]),  # wrong, and no "yes"
        answer("no", "no", lists=[2]),
    ]
    found = rbench(records)
    first = found["by_list"]["1"]
    assert (first["accuracy"], first["precision"], first["recall"], first["f1"]) == (40, 50, 50, 50)
    assert first["yes_ratio"] == 40 and first["items"] == 5
    assert found["by_list"]["2"]["f1"] == 100
    assert found["f1"] == 75 and found["accuracy"] == 70 and found["unparsable"] == 1 and found["items"] == 6


def test_reefknot_by_hand():
    common = [
        answer("yes", "yes", task="yesno", relation_type="perception"),
        answer("yes", "no", task="yesno", relation_type="cognitive"),
        answer("The answer is B.", "B", task="multichoice", relation_type="perception"),
        answer("(C)", "D", task="multichoice", relation_type="perception"),
        answer("", "A", task="multichoice", relation_type="cognitive"),
        answer("C", "C. riding", task="multichoice", relation_type="cognitive"),
        answer("He is riding the horse", "riding a horse", task="vqa", relation_type="cognitive"),
    ]
    found = reefknot(common)
    assert found["yesno"]["accuracy"] == 50 and found["yesno"]["perception"]["accuracy"] == 100
    assert found["yesno"]["precision"] == 50 and found["yesno"]["recall"] == 100
    assert found["multichoice"]["accuracy"] == 50 and found["multichoice"]["unparsable"] == 1
    assert found["multichoice"]["cognitive"] == {"accuracy": 50, "items": 2}
    assert found["vqa"]["accuracy"] == 100 and found["vqa"]["hallucination_rate"] == 0
    assert found["yesno_f1"] == found["yesno"]["f1"] == pytest.approx(200 / 3)
    # Without a judge there is no rscore: the label's words in the answer are another measure.
    assert "rscore" not in found and found["rscore_verbatim"] == pytest.approx((50 + 50 + 100) / 3)
    judged = reefknot([*common[:-1], {**common[-1], "verdict": False}])
    assert judged["vqa"]["accuracy"] == 0 and judged["rscore"] == pytest.approx(100 / 3)
    assert "rscore_verbatim" not in judged


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 0), ("B.", 1), ("(B)", 1), ("The answer is B", 1), ("b", None), ("", None), ("Both", None),
        ("A man on a horse", 0), ("Answer: C", None), ("B) a dog", 1), ("I'd say A.", 0), ("A's", None),
    ],
)  # fmt: skip
def test_letters(text, expected):
    assert letter(text, 2) == expected


def test_doubtful_letters():
    assert letter_is_doubtful("A man") and not letter_is_doubtful("A. man") and not letter_is_doubtful("B man")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", True), ("No", False), ("There is not a dog", False), ("Maybe", True), ("Yes. No.", True), (" ", None),
     ("no, it isn't", False), ("Nothing", True)],
)  # fmt: skip
def test_popes_rule(text, expected):
    assert yes_or_no(text) is expected


def test_open_answers():
    assert contains("The man is riding a horse.", "riding horse") and contains("Riding", "riding")
    assert not contains("override", "ride") and not contains("", "x") and not contains("horse riding", "riding horse")
    assert not contains("anything", "")


def sheets(answer_of):
    """Every scorer's headline on records that `answer_of(rng, truth, options)` answered."""
    rng = random.Random(0)

    def score(good, count=2):
        """Scores of `count` options of which the first is true: 1 for the one that is chosen."""
        chosen = answer_of(rng, 0, list(range(count)))
        return [[1.0 if option == chosen else 0.0] for option in range(count)]

    def square():
        columns = [answer_of(rng, image, [0, 1]) for image in (0, 1)]
        return [[1.0 if columns[image] == caption else 0.0 for image in (0, 1)] for caption in (0, 1)]

    def yes_no(label):
        return "Yes" if answer_of(rng, label, ["yes", "no"]) == "yes" else "No"

    size = 4000
    labels = ["yes" if n % 2 else "no" for n in range(size)]
    return {
        "sugarcrepe": sugarcrepe(
            {"id": n, "subset": SUBSETS[n % 7], "scores": score(True)} for n in range(size)
        )["overall"],
        "sade": sade(
            {"id": n, "category": CATEGORIES[1 + n % 5], "scores": score(True)} for n in range(size)
        )["macro"],
        "winoground": winoground({"id": n, "scores": square()} for n in range(size))["pairwise"],
        "bivlc": bivlc({"id": n, "scores": square()} for n in range(size))["i2t"],
        "rbench": rbench(
            {"id": n, "label": label, "text": yes_no(label), "lists": [n % 5]} for n, label in enumerate(labels)
        )["accuracy"],
        "reefknot": reefknot(
            {"id": n, "task": "yesno", "relation_type": "perception", "label": label, "text": yes_no(label)}
            for n, label in enumerate(labels)
        )["yesno"]["accuracy"],
    }  # fmt: skip


def test_perfect_answers_give_100():
    assert set(sheets(lambda rng, truth, options: truth).values()) == {100}


def test_inverted_answers_give_0():
    found = sheets(lambda rng, truth, options: next(option for option in options if option != truth))
    assert set(found.values()) == {0}


def test_coin_flips_give_chance():
    found = sheets(lambda rng, truth, options: rng.choice(options))
    chance = {"bivlc": 25}
    for name, value in found.items():
        assert value == pytest.approx(chance.get(name, 50), abs=3), name


@pytest.mark.parametrize(
    ("scorer", "record", "message"),
    [
        (sugarcrepe, {"id": 7, "scores": [[1], [0]]}, "record 7: has no 'subset'"),
        (sugarcrepe, {"id": 7, "subset": "swap", "scores": [[1], [0]]}, "subset 'swap' must be one of add_att"),
        (sugarcrepe, {"id": 7, "subset": "swap_obj"}, "record 7: has no 'choices'"),
        (rbench, {"id": 3, "lists": [1], "text": "yes", "label": "maybe"}, "label 'maybe' must be yes or no"),
        (reefknot, {"id": 3, "task": "chat"}, "task 'chat' must be one of yesno"),
        (sugarcrepe, {"id": 7, "subset": "swap_obj", "scores": [[float("nan")], [0]]}, "record 7: scores hold NaN"),
        (winoground, {"id": 7, "scores": [[1, 0], [0, float("nan")]]}, "record 7: scores hold NaN"),
        (winoground, {"id": 7, "scores": [["1", 0], [0, 1]]}, r"record 7: scores must be \[captions\]\[images\], are"),
        (winoground, {"id": 7, "scores": 3}, "record 7: scores must be"),
        (
            winoground,
            {"id": 7, "choices": [{"options": [0, 1], "picked": "A"}]},
            "record 7: choices hold .* no choice",
        ),
        (winoground, {"id": 7, "choices": [{"options": [0, 1], "picked": 2}]}, "record 7: choices hold .* no choice"),
        (winoground, {"id": 7, "choices": [{"options": 2, "picked": 0}]}, "record 7: choices hold .* no choice"),
        (winoground, {"id": 7, "choices": {"a": 1}}, "record 7: choices hold .* no choice"),
        (winoground, {"id": 7, "choices": [{"options": [0, 1], "picked": 0, "text": 1}]}, "record 7: the text of a"),
        (rbench, {"id": 3, "lists": [1], "text": {"a": 1}, "label": "yes"}, "record 3: text must be a text, is {'a'"),
        (reefknot, {"id": 3, "task": ["chat"]}, "must be one of yesno"),
    ],
)
def test_records_that_cannot_be_read_are_named(scorer, record, message):
    with pytest.raises(RecordError, match=message):
        scorer([record])


def test_nothing_to_score():
    assert sugarcrepe([])["overall"] is None and reefknot([])["yesno_f1"] is None and rbench([])["f1"] is None
