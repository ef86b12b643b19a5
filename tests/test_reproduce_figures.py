"""The figures of `reproduce`: what is measured on a student, and what is made of several seeds."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava_compodistill.analysis.samples import thinned
from llava_compodistill.reproduce import cli, figures
from llava_compodistill.reproduce.report import figure_markdown
from miniature import weights
from miniature.reproduction import MiniatureWorld

MEASURED = {
    "figure2": lambda bonus: {
        "band": [0, 1],
        **{f"{kind} {keys}": [0.5 + bonus, 0.4 + bonus, 0.3] for kind in ("vqa", "cr") for keys in ("visual", "text")},
    },
    "figure3": lambda bonus: {
        "similarity": [0.2, 0.5], "probability": [0.1, 0.4 + bonus], "n": [4, 4], "correlation": 0.3 + bonus, "p": 0.1,
    },
    "figure4": lambda bonus: {
        "": {"before": 50.0, "after": 51.0 + 10 * bonus, "n": 8}, "swap": {"before": 40.0, "after": 40.0, "n": 4},
    },
}  # fmt: skip


class World:
    name, metrics, band = "fake", {}, "early"

    def normal(self, recipe):
        return recipe

    def load(self, checkpoint):
        raise AssertionError("what is there is not measured again")


@pytest.fixture
def runs(tmp_path):
    """Four students with three seeds, measured before."""
    found = {}
    for student, recipe in figures.STUDENTS.items():
        for seed in range(3):
            folder = tmp_path / f"{student}-{seed}"
            folder.mkdir()
            bonus = 0.01 * seed + (0.1 if student in ("KD", "CompoDistill") else 0.0)
            for name, measured in MEASURED.items():
                (folder / f"{name}.json").write_text(json.dumps(measured(bonus)))
            found[recipe.key, seed] = {"checkpoint": str(folder)}
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_a_figure_over_seeds(runs, tmp_path, name):
    drawn = figures.draw(name, runs, World(), [0, 1, 2], tmp_path)
    with Image.open(drawn.picture) as image:
        assert image.width > 400
    assert drawn.values["KD"][2] == MEASURED[name](0.12)
    text = figure_markdown(drawn)
    assert f"]({name}.png)" in text and text.count("| **") + text.count("undecided") == len(drawn.verdicts)
    verdicts = {verdict.claim.better: verdict for verdict in drawn.verdicts}
    if name == "figure2":
        assert verdicts["KD"].difference == pytest.approx(10) and verdicts["KD"].verdict == "holds"
        assert verdicts["CompoDistill"].verdict == "undecided", "alike here"
    elif name == "figure3":
        assert verdicts["KD"].difference == pytest.approx(41) and verdicts["KD"].verdict == "holds"
    else:
        assert verdicts["KD"].difference == pytest.approx(2.1)


def test_the_command_knows_every_figure():
    assert cli.FIGURES.keys() == figures.FIGURES.keys() == MEASURED.keys()
    assert {recipe.key for recipe in cli.FIGURE_STUDENTS} == {recipe.key for recipe in figures.STUDENTS.values()}
    students = {*figures.STUDENTS, "0"}
    assert all({claim.better, claim.worse} <= students for f in figures.FIGURES.values() for claim in f.claims)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
def test_what_is_measured_on_a_student(distilled, tmp_path):
    world = MiniatureWorld("smoke", tmp_path)
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(distilled / name)
    samples = {kind: world.samples(kind) for kind in ("vqa", "cr")}
    assert all(sample.wrong and sample.subset for sample in samples["cr"]) and not samples["vqa"][0].wrong
    world.samples = lambda kind: thinned(samples[kind], 8)
    teacher, student = world.load(None), world.load(distilled / "llava-student")
    found = {name: figure.measure(world, teacher, student) for name, figure in figures.FIGURES.items()}
    assert found["figure2"]["band"] == [2, 3, 4] and len(found["figure2"]["cr text"]) == 6
    itself = figures.FIGURES["figure2"].measure(world, teacher, teacher)
    assert figures.FIGURES["figure2"].scores(itself)["vqa visual"] == pytest.approx(100, abs=1e-3)
    assert len(found["figure3"]["probability"]) == 8 and sum(found["figure3"]["n"]) == 8
    assert found["figure4"][""]["n"] == 8 and 0 <= found["figure4"][""]["after"] <= 100
    assert json.loads(json.dumps(found)) == found
