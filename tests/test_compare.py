"""Comparisons: headlines made of sums, intervals of known width, and pairs that differ or do not."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.eval.compare import bootstrap, compare, parts, short_names
from llava_compodistill.eval.scorers import SADE, SUGARCREPE
from llava_compodistill.eval.summaries import EVERY

#: Those whose answers can be counted without a server.
COUNTED = [name for name, benchmark in EVERY.items() if benchmark.score]


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
            record |= {"subset": SUGARCREPE[number % 3], "scores": pair()}  # of unequal worth
        elif name == "sade":
            category = SADE[number % 6 if number % 5 else 0]
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
    benchmark = EVERY[name]
    figures = benchmark.score(made)
    summary = {
        "benchmark": name,
        "protocol": "some",
        "model": folder.name,
        "items": len(made),
        "fingerprint": "same",
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
    for seed in range(3):
        made = records(name, seed=seed)
        found = parts(name, made)
        whole = found.value(found.sums(np.ones((1, len(found.strata)))))
        assert whole == pytest.approx([EVERY[name].score(made)[EVERY[name].headline]])
        # A sample in which an item is drawn twice is that of a record that stands there twice.
        counts = np.ones((1, len(found.strata)))
        counts[0, 7], counts[0, 8] = 2, 0
        if name in ("bivlc", "winoground", "rbench", "gqa", "textvqa"):  # units are items
            drawn = [*made[:8], made[7], *made[9:]]
            expected = EVERY[name].score(drawn)[EVERY[name].headline]
            assert found.value(found.sums(counts)) == pytest.approx([expected])


def test_the_interval_of_a_share_is_the_binomials():
    made = [{"id": n, "subset": "swap_obj", "scores": [[1], [0]] if n % 2 else [[0], [1]]} for n in range(400)]
    drawn = bootstrap([parts("sugarcrepe", made)], 4000)
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = 100 * 1.96 * (0.25 / 400) ** 0.5
    assert low == pytest.approx(50 - width, abs=0.6) and high == pytest.approx(50 + width, abs=0.6)


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
    with pytest.raises(DataError, match="its protocol is 'choice', that of"):
        compare([path, write(tmp_path / "f", "sugarcrepe", made, protocol="choice")])
    with pytest.raises(DataError, match="300 records of 299"):
        compare([write(tmp_path / "c", "sugarcrepe", made, items=299)])
    with pytest.raises(DataError, match="its records give"):
        compare([write(tmp_path / "d", "sugarcrepe", made, value=12.0)])
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.json").write_text("{}")
    with pytest.raises(DataError, match="x.json: no summary"):
        compare([tmp_path / "e" / "x.json"])


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
