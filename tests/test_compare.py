"""Comparisons: headlines made of sums, intervals of known width, and pairs that differ or do not."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from scipy import stats

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.eval.benchmarks import get, registered
from llava_compodistill.eval.benchmarks.sade import CATEGORIES
from llava_compodistill.eval.benchmarks.sugarcrepe import SUBSETS
from llava_compodistill.eval.compare import bootstrap, compare, paired_p, short_names

pytestmark = pytest.mark.once  # nothing here depends on transformers

#: Those whose answers can be counted without a server.
COUNTED = [name for name, benchmark in registered().items() if benchmark.score]


def records(name, size=300, skill=0.7, seed=0):
    """Records of a benchmark, an answer being right with probability `skill`."""
    rng = random.Random(seed)

    def pair():
        return [[1.0], [0.0]] if rng.random() < skill else [[0.0], [1.0]]

    def square():
        return [[rng.random() + skill * (c == i) for i in (0, 1)] for c in (0, 1)]

    made = []
    for number in range(size):
        record = {"id": str(number)}
        if name == "sugarcrepe":
            record |= {"subset": SUBSETS[number % 3], "scores": pair()}  # of unequal worth
        elif name == "sade":
            category = CATEGORIES[number % 6 if number % 5 else 0]
            record |= {"category": category, "scores": square() if category == "comprehensive" else pair()}
        elif name in ("bivlc", "winoground"):
            record |= {"type": "swap", "scores": square()}
        elif name == "textvqa":
            record |= {"text": "x", "value": 0.3 * round(2 * rng.random()) + 0.4 * (rng.random() < skill)}
        elif name == "gqa":
            record |= {"text": "Red." if rng.random() < skill else "blue", "label": "red"}
        elif name == "mme":
            label = ("yes", "no")[number % 2]
            category = ("position", "code_reasoning", "color", "color")[number // 2 % 4]
            text = label if rng.random() < skill else rng.choice(["Yes", "No", "?"])
            record |= {"label": label, "text": text, "category": category, "image": str(number // 2)}
        else:
            label = rng.choice(["yes", "no"])
            wrong = {"yes": "No.", "no": "Yes."}[label]
            text = label.capitalize() if rng.random() < skill else rng.choice([wrong, wrong, ""])
            record |= {"label": label, "text": text, "lists": [1 + number % 5, 1 + (number + 1) % 5]}
            record |= {"task": "yesno", "relation_type": "perception", "category": f"part {number % 3}"}
            if name == "reefknot" and number % 3:
                answer = "A" if rng.random() < skill else "B"
                record |= {"task": "multichoice" if number % 2 else "vqa", "label": "A", "text": answer}
        made.append(record)
    return made


def write(folder, name, made, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = get(name)
    figures = benchmark.score(made)
    summary = {
        "benchmark": name,
        "protocol": "some",
        "model": folder.name,
        "items": len(made),
        "fingerprint": "same",
        "pins": {"protocol": "some", "prompt": "USER: <image>\n{question}", "dtype": "float32"},
        "headline": benchmark.headline,
        "value": figures[benchmark.headline],
        "figures": figures,
        **changes,
    }
    (folder / f"{name}.json").write_text(json.dumps(summary))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    return folder / f"{name}.json"


@pytest.mark.parametrize("name", COUNTED)
def test_headlines_are_those_of_the_scorer(name):
    benchmark = get(name)
    for seed in range(3):
        made = records(name, seed=seed)
        found = benchmark.sums(made)
        assert found.headline() == pytest.approx(benchmark.score(made)[benchmark.headline])
        # A sample in which an item is drawn twice is that of a record that stands there twice.
        if name in ("bivlc", "winoground", "rbench", "gqa", "textvqa"):  # units are items
            drawn = [np.where(units == 8, 7, units) for units in found.by_stratum()]
            expected = benchmark.score([*made[:8], made[7], *made[9:]])[benchmark.headline]
            assert found.headline(drawn) == pytest.approx(expected)


def test_the_interval_of_a_share_is_the_binomials():
    made = [{"id": n, "subset": "swap_obj", "scores": [[1], [0]] if n % 2 else [[0], [1]]} for n in range(400)]
    drawn = bootstrap([get("sugarcrepe").sums(made)], 4000)
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = 100 * 1.96 * (0.25 / 400) ** 0.5
    assert low == pytest.approx(50 - width, abs=0.6) and high == pytest.approx(50 + width, abs=0.6)


def test_items_are_drawn_within_their_stratum_and_for_all_models_alike():
    """Subsets of unequal size, one of them a single item; one model right where the other is wrong."""
    made = [{"id": n, "subset": SUBSETS[(n > 0) + (n > 40)], "scores": [[n % 2], [0.5]]} for n in range(61)]
    inverted = [{**record, "scores": [[1 - record["scores"][0][0]], [0.5]]} for record in made]
    drawn = bootstrap([get("sugarcrepe").sums(rows) for rows in (made, inverted)], 4000)
    assert drawn.shape == (2, 4000) and np.allclose(drawn.sum(axis=0), 100)
    # Variances of the subsets' means add up: n = 1 (none), 40 and 20.
    spread = 100 / 3 * (0.25 / 40 + 0.25 / 20) ** 0.5
    assert drawn[0].std() == pytest.approx(spread, rel=0.05)
    alone = [{"id": n, "subset": subset, "scores": [[n % 2], [0.5]]} for n, subset in enumerate(SUBSETS)]
    found = bootstrap([get("sugarcrepe").sums(alone)], 10)
    assert np.all(found == pytest.approx(300 / 7)) and found.shape == (1, 10)


def test_the_p_of_paired_shares_is_the_sign_tests():
    """Where two models differ on 12 items, one of them right on 10: swaps of those 12 are coin flips."""
    better = [{"id": n, "label": "a", "text": "a" if n >= 2 else "b"} for n in range(100)]
    worse = [{"id": n, "label": "a", "text": "b" if 2 <= n < 12 else "a"} for n in range(100)]
    expected = stats.binomtest(10, 12).pvalue
    found = paired_p(get("gqa").sums(worse), get("gqa").sums(better), 10_000)
    assert found == pytest.approx(expected, abs=0.006)
    assert paired_p(get("gqa").sums(better), get("gqa").sums(better), 100) == 1


def test_p_is_seldom_small_where_models_are_alike():
    """The mean of F1 over lists, of models of equal skill: p below 0.1 in about a tenth of the pairs."""
    rng, found = random.Random(0), []
    for _ in range(60):
        models = []
        for _ in range(2):
            made = [
                {"id": n, "label": label, "text": label if rng.random() < 0.7 else "", "lists": [n % 5]}
                for n, label in enumerate(["yes", "no"] * 60)
            ]
            models.append(get("rbench").sums(made))
        found.append(paired_p(*models, 199))
    assert 1 <= np.count_nonzero(np.array(found) < 0.1) <= 14  # binomial: 6 expected, 99.9 % within


def test_a_model_does_not_differ_from_itself(tmp_path):
    made = records("sugarcrepe")
    first, second = compare([write(tmp_path / name, "sugarcrepe", made) for name in ("a", "b")])
    assert second["difference"] == second["difference_low"] == second["difference_high"] == 0 and second["p"] == 1
    assert first["low"] < first["value"] < first["high"] and (first["low"], first["high"]) == (
        second["low"],
        second["high"],
    )


@pytest.mark.parametrize("name", COUNTED)
def test_a_better_model_is_better_and_chance_is_not(tmp_path, name):
    good, bad, alike = (
        write(tmp_path / str(n), name, records(name, skill=skill, seed=n)) for n, skill in enumerate([0.95, 0.5, 0.5])
    )
    _, better = compare([bad, good])
    assert better["p"] < 0.01 and better["difference_low"] > 0
    _, same = compare([bad, alike])
    assert same["difference_low"] < 0 < same["difference_high"] and same["p"] > 0.05


def test_pairing_sees_what_two_intervals_do_not(tmp_path):
    """One model right wherever the other is, and on a few items more: their intervals overlap, the pair differs."""
    made = records("winoground", size=200, skill=0.5)
    better = [dict(record) for record in made]
    changed = 0
    for record in better:
        if record["scores"][0][0] <= record["scores"][1][0] and changed < 12:
            record["scores"] = [[9, 0], [0, record["scores"][1][1]]]
            changed += 1
    first, second = compare([write(tmp_path / "a", "winoground", made), write(tmp_path / "b", "winoground", better)])
    assert second["low"] < first["high"] and second["p"] < 0.01


def test_what_cannot_be_compared(tmp_path):
    made = records("sugarcrepe")
    path = write(tmp_path / "a", "sugarcrepe", made)
    other = write(tmp_path / "b", "sugarcrepe", made, fingerprint="other")
    with pytest.raises(DataError, match="about other questions"):
        compare([path, other])
    with pytest.raises(DataError, match="300 records of 299"):
        compare([write(tmp_path / "c", "sugarcrepe", made, items=299)])
    moved = [{**record, "subset": "add_obj"} for record in made]
    with pytest.raises(DataError, match=r"sugarcrepe\.jsonl: its records belong to other groups of items"):
        compare([path, write(tmp_path / "f", "sugarcrepe", moved)])
    with pytest.raises(DataError, match=r"g/sugarcrepe\.json: has no score"):
        compare([path, write(tmp_path / "g", "sugarcrepe", made, value=None)])
    with pytest.raises(DataError, match="its records give"):
        compare([write(tmp_path / "d", "sugarcrepe", made, value=12.0)])
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.json").write_text("{}")
    with pytest.raises(DataError, match="x.json: no summary"):
        compare([tmp_path / "e" / "x.json"])


def test_what_was_made_in_another_way_is_refused_unless_asked_for(tmp_path, capsys):
    made = records("sugarcrepe")
    path = write(tmp_path / "a", "sugarcrepe", made)
    pins = {"protocol": "some", "prompt": "USER: <image>\n{question} ASSISTANT:", "dtype": "bfloat16"}
    other = write(tmp_path / "b", "sugarcrepe", made, pins=pins)
    with pytest.raises(DataError, match=r"prompt 'USER: .* ASSISTANT:', not 'USER: .*dtype 'bfloat16', not 'float32'"):
        compare([path, other])
    assert [row["differ"] for row in compare([path, path], 50)] == [[], []]
    rows = compare([path, other], 50, anyway=True)
    assert rows[0]["differ"] == [] and [text.split(" ")[0] for text in rows[1]["differ"]] == ["prompt", "dtype"]
    older = write(tmp_path / "c", "sugarcrepe", made, pins=None)
    with pytest.raises(DataError, match="has no pins: it was written by an earlier version"):
        compare([older, older])
    picture = str(tmp_path / "c.png")
    flags = [str(tmp_path / "a"), str(tmp_path / "b"), "--samples", "50", "--output", picture]
    assert main(["compare", *flags]) == 2 and "were not made in the same way" in capsys.readouterr().err
    assert main(["compare", *flags, "--anyway"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "b*" in printed and "* SugarCrepe, b: not made in the same way as a: prompt " in printed


def test_command(tmp_path, capsys):
    for model, skill in (("teacher", 0.9), ("student", 0.6)):
        for name in ("sugarcrepe", "rbench"):
            write(tmp_path / model, name, records(name, skill=skill))
    write(tmp_path / "teacher", "sade", records("sade"))  # only one of them has it
    picture = tmp_path / "pictures" / "c.png"
    folders = [str(tmp_path / model) for model in ("student", "teacher")]
    assert main(["compare", *folders, "--samples", "300", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "SugarCrepe" in printed and "R-Bench" in printed and "SADE" not in printed
    assert "student" in printed and "teacher" in printed and picture.stat().st_size > 5000
    write(tmp_path / "student", "sugarcrepe", records("sugarcrepe"), figures={})  # a score from elsewhere
    assert main(["compare", *folders, "--samples", "10", "--output", str(picture)]) == 0
    assert "SugarCrepe" not in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "student" / "sugarcrepe.json")]) == 2
    assert "no score that was counted from records" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "no summary" in capsys.readouterr().err


def test_names_are_as_long_as_they_must_be(tmp_path):
    paths = [tmp_path / "kd" / "eval" / "a.json", tmp_path / "vat" / "eval" / "a.json"]
    assert short_names(paths) == ["kd", "vat"]
    assert short_names([*paths, tmp_path / "x" / "kd" / "eval" / "a.json"])[0] != "kd"
    assert short_names(paths[:1]) == ["eval"] and len(set(short_names([paths[0], tmp_path / "kd" / "a.json"]))) == 2
