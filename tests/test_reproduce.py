"""`llava-compodistill reproduce`: recipes as scripts, the grid, verdicts, the report."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from llava_compodistill import about, train
from llava_compodistill.cli import main
from llava_compodistill.reproduce import cli, grid, report
from llava_compodistill.reproduce.claims import equivalence, holm, interval, judge, judge_family, seeds_needed
from llava_compodistill.reproduce.recipes import COMPODISTILL, KD, SFT, Recipe
from llava_compodistill.reproduce.studies import STUDIES, Claim, Gap, Row, Study
from llava_compodistill.reproduce.world import stage_settings
from llava_compodistill.train.mix import Mix, read_sources
from miniature import weights
from miniature.dataset import WorldConfig, write_dataset
from miniature.reproduction import MiniatureWorld


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------
def scripts(recipe, tmp_path):
    """(script, what it starts from, flags of the start) of each stage."""
    outputs, found = [], []
    for position, stage in enumerate(recipe.stages):
        script, environment, flags = stage_settings(recipe, position, outputs, "BASE")
        start = environment.get("DFT") if script == "sft.sh" else environment["STUDENT"]
        named = {"--stage", "--pretrain_mm_mlp_adapter"} & set(flags)
        more = {name: flags[flags.index(name) + 1] for name in named}
        found.append((script, start.removeprefix(f"{tmp_path}/"), more))
        assert environment["PROJECTOR"] == recipe.projector and environment["VAT"] == str(recipe.vat)
        assert flags[:4] == ["--method", recipe.method, "--method_options", recipe.options]
        outputs.append(tmp_path / f"{position}-{stage}")
    return found


def test_the_recipes_of_table_14_are_sequences_of_scripts(tmp_path):
    """As scripts/README.md lists them."""
    rows = STUDIES["table14"].rows
    adapter = {"--pretrain_mm_mlp_adapter": str(tmp_path / "0-dpt" / "mm_projector.bin")}
    pt = {"--pretrain_mm_mlp_adapter": str(tmp_path / "0-pt" / "mm_projector.bin")}
    dpt, plain = ("dpt.sh", "BASE", {"--stage": "dpt"}), ("dpt.sh", "BASE", {"--stage": "pt"})
    expected = {
        "1": [plain, ("sft.sh", "BASE", pt)],
        "2": [plain, ("dft.sh", "BASE", {})],
        "3": [dpt, ("sft.sh", "BASE", adapter)],
        "4": [dpt, ("dft.sh", "BASE", {})],
        "5": [dpt, ("sft.sh", "BASE", adapter), ("dft.sh", "1-sft", {"--pretrain_mm_mlp_adapter": ""})],
        "full": [dpt, ("dft.sh", "BASE", {}), ("sft.sh", "1-dft", {})],
    }
    for name, wanted in expected.items():
        assert scripts(rows[name].recipe, tmp_path) == wanted, name


def test_every_recipe_has_its_own_name():
    recipes = {row.recipe for study in STUDIES.values() for row in study.rows.values() if row.recipe}
    assert len({recipe.key for recipe in recipes}) == len(recipes) > 25
    assert KD.key == Recipe(method="kd", projector="mlp2x_gelu", vat=False).key


def test_every_claim_names_rows_of_its_table():
    for study in STUDIES.values():
        for claim in study.claims:
            assert {claim.better, claim.worse} <= study.rows.keys(), claim
            assert claim.metric in (study.metrics or ("vqa", "cr")), claim
            # The paper's own figures agree with what it says of them.
            figures = [study.rows[row].paper.get(claim.metric) for row in (claim.better, claim.worse)]
            assert None in figures or figures[0] > figures[1], claim


@pytest.mark.parametrize("stages", [("dft", "sft"), ("dpt", "dpt", "sft"), ("dpt", "dft", "pt")])
def test_stages_begin_with_the_adapter(stages):
    with pytest.raises(ValueError, match="one that trains the adapter, then others"):
        Recipe(stages=stages)


def test_the_miniature_trains_equal_numbers_of_steps(tmp_path):
    world = MiniatureWorld("cpu", tmp_path)
    for recipe in (COMPODISTILL, SFT, *(row.recipe for row in STUDIES["table14"].rows.values())):
        steps = [world.steps_and_rate(recipe, position)[0] for position in range(len(recipe.stages))]
        assert sum(steps) == 1400, recipe
    half = replace(COMPODISTILL, steps=0.5, rate=1e-3)
    assert [world.steps_and_rate(half, position) for position in range(3)] == [(60, 1e-3), (600, 1e-3), (70, 7.5e-5)]
    assert half.key != COMPODISTILL.key and "rate" not in COMPODISTILL.described()
    rows = STUDIES["table3b"].rows
    assert world.normal(rows["intermediate"].recipe) == COMPODISTILL, "the miniature's own band is not trained twice"
    assert world.normal(rows["later"].recipe) == rows["later"].recipe


def test_the_miniature_has_something_for_every_row(tmp_path):
    """What stands for models and data that it lacks; and runs of earlier versions keep their names."""
    world = MiniatureWorld("cpu", tmp_path)
    rows = {name: study.rows for name, study in STUDIES.items()}
    shallow = world.normal(rows["table3c"]["simple"].recipe)
    assert shallow.student == "shallow" and shallow.flags[:2] == ("--student_layers", "all")
    for table, row, key in (
        ("table2", "d", "compodistill-dpt-dft-sft-dea0b8d7"),
        ("table3c", "simple", "compodistill-dpt-dft-sft-07716bc7"),
        ("table5", "half", "compodistill-dpt-dft-sft-92922594"),
        ("table5", "whole", "compodistill-dpt-dft-sft-dea0b8d7"),
        ("table6", "large", "compodistill-dpt-dft-sft-dea0b8d7"),
        ("table6", "small", "compodistill-dpt-dft-sft-205320f9"),
        ("table14", "1", "compodistill-pt-sft-b68b7274"),
    ):
        assert world.normal(rows[table][row].recipe).key == key, (table, row)
    recipes = [world.normal(row.recipe) for table in rows.values() for row in table.values() if row.recipe]
    assert {recipe.student for recipe in recipes} == {"default", "shallow", "small", "llama"}


def test_more_data_of_the_miniature(tmp_path):
    """Table 9's second file, and a teacher's conversations where there are none yet: no scene occurs twice."""
    data, world = tmp_path / "data", MiniatureWorld("smoke", tmp_path)
    write_dataset(data, replace(WorldConfig.preset("smoke"), instruct_teacher=0), progress=False)
    world._write_missing_data([COMPODISTILL])
    assert not (data / "instruct_extra.json").exists()
    world._write_missing_data([replace(COMPODISTILL, mix="scaled"), replace(COMPODISTILL, teacher="small")])
    records = {
        name: json.loads((data / f"instruct_{name}.json").read_text()) for name in ("student", "extra", "teacher")
    }
    for name, images in (("extra", 64), ("teacher", 160)):
        shown = {record["image"] for record in records[name] if "image" in record}
        assert len(shown) == images and all((data / "images" / image).is_file() for image in shown)
    lines = [line for path in (data / "scenes").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len({json.dumps(json.loads(line)["objects"]) for line in lines}) == len(lines)
    mix = Mix(read_sources(str(world._instructions(1.0, "scaled"))), str(data / "images"), "error", True, 0)
    assert len(mix) == len(records["student"]) + len(records["extra"])
    assert mix[len(mix) - 1]["id"] == records["extra"][-1]["id"]


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------
class FakeWorld:
    name, title = "fake", "a fake world"
    metrics, more = {"cr": "compositional", "vqa": "recognition"}, {}

    def __init__(self):
        self.trained, self.prepared, self.fails = [], [], False

    def settings(self):
        return {"world": "fake"}

    def normal(self, recipe):
        return recipe

    def models(self, recipe):
        return {}

    def refusal(self, recipe):
        return None

    def stop(self):
        pass

    def prepare(self, recipes):
        self.prepared.append(sorted(recipe.method for recipe in recipes))

    def train(self, recipe, seed, folder, threads, on_log):
        if self.fails and recipe.method == "sft":
            raise RuntimeError("out of memory")
        folder.mkdir(parents=True, exist_ok=True)
        self.trained.append((recipe.method, seed))
        on_log()
        return {"checkpoint": str(folder), "seconds": 1.0, "steps": 3}

    def evaluate(self, checkpoint, teacher="default"):
        if checkpoint is None:
            return {"cr": 90.0, "vqa": 95.0}
        bonus = 10.0 if "compodistill" in checkpoint.name else 0.0
        return {"cr": 60.0 + bonus + int(checkpoint.name[-1]), "vqa": 70.0}


STUDY = Study(
    "table",
    "Table 0: two methods",
    {
        "teacher": Row("Teacher", None, {"vqa": 62.6, "cr": 70.3}),
        "sft": Row("SFT", SFT, {"vqa": 54.9, "cr": 60.7}),
        "full": Row("CompoDistill", COMPODISTILL),
    },
    (Claim("it helps", "full", "sft"), Claim("it helps VQA", "full", "sft", "vqa")),
    note="A note.",
)


def run_grid(world, root, seeds=(0, 1)):
    recipes = [SFT, COMPODISTILL, SFT]
    return grid.train_grid(world, recipes, seeds, root, 2, Console(quiet=True))


def test_each_run_is_made_once(tmp_path):
    world = FakeWorld()
    runs = run_grid(world, tmp_path)
    assert sorted(world.trained) == [("compodistill", 0), ("compodistill", 1), ("sft", 0), ("sft", 1)]
    record = runs[COMPODISTILL.key, 1]
    assert record["scores"] == {"cr": 71.0, "vqa": 70.0} and record["recipe"] == COMPODISTILL.described()
    assert record["seed"] == 1 and record["environment"]["torch"] and record["steps"] == 3
    again = FakeWorld()
    assert run_grid(again, tmp_path) == runs and again.trained == [] == again.prepared
    run_grid(again, tmp_path, seeds=(0, 1, 2))
    assert sorted(again.trained) == [("compodistill", 2), ("sft", 2)] and again.prepared == [["compodistill", "sft"]]
    again.settings = lambda: {"world": "changed"}
    run_grid(again, tmp_path, seeds=(0,))
    assert len(again.trained) == 4, "runs of another world are other runs"


def test_a_failing_run_leaves_the_finished_ones(tmp_path):
    world = FakeWorld()
    world.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run_grid(world, tmp_path)
    finished = set(world.trained)
    world.fails = False
    world.trained.clear()
    run_grid(world, tmp_path)
    assert len(world.trained) == 4 - len(finished) and not finished & set(world.trained)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------
def judged(differences):
    scores = {"full": dict(enumerate(differences)), "sft": dict.fromkeys(range(len(differences)), 0.0)}
    return judge(STUDY.claims[0], scores)


def test_a_verdict_is_the_paired_t_test():
    better, worse = [70.1, 74.3, 69.8, 75.0], [66.0, 70.2, 68.9, 69.1]
    scores = {"full": dict(enumerate(better)), "sft": {**dict(enumerate(worse)), 9: 3.0}}
    found = judge(STUDY.claims[0], scores)
    reference = stats.ttest_rel(better, worse)
    bounds = reference.confidence_interval()
    assert found.p == pytest.approx(reference.pvalue) and found.seeds == 4
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))
    assert found.verdict == ("holds" if bounds.low > 0 else "undecided")


def test_verdicts():
    assert judged([5.0, 5.1, 4.9]).verdict == "holds" and judged([-5.0, -5.1, -4.9]).verdict == "does not hold"
    open_one = judged([3.0, -1.0, 4.0])
    assert open_one.verdict == "undecided" and open_one.needed > 3
    assert judged([-3.0, 1.0, -4.0]).needed is None, "no number of seeds turns the sign"
    assert judged([0.0, 0.0]).verdict == "undecided" and judged([0.0, 0.0]).p == 1
    assert judged([1.0]) is None


def test_the_seeds_needed_have_the_power(monkeypatch):
    """By simulation."""
    import numpy

    count = seeds_needed(1.0, 1.5)
    generator = numpy.random.default_rng(0)
    for seeds, enough in ((count, True), (count - 4, False)):
        found = stats.ttest_1samp(generator.normal(1.0, 1.5, (4000, seeds)), 0, axis=1)
        power = ((found.pvalue < 0.05) & (found.statistic > 0)).mean()
        assert (power > 0.78) == enough, (seeds, power)
    assert seeds_needed(0.001, 10.0) is None
    seeds = seeds_needed(1.0, 0.5, level=0.999, power=0.95)
    found = stats.ttest_1samp(generator.normal(1.0, 0.5, (4000, seeds)), 0, axis=1)
    assert 0.94 < (found.pvalue < 0.001).mean() < 0.99 and seeds > seeds_needed(1.0, 0.5)


def test_the_interval_covers_what_it_should():
    import numpy

    draws = numpy.random.default_rng(1).normal(2.0, 3.0, (2000, 4))
    covered = [low <= 2.0 <= high for low, high, _ in map(interval, draws.tolist())]
    assert abs(sum(covered) / len(covered) - 0.95) < 0.015


def test_the_permutation_test_changes_all_signs():
    differences = [5.0, 3.0, 8.0, -1.0, 2.0, 9.0, 4.0]
    found = judged(differences)
    sums = [abs(sum(a * b for a, b in zip(differences, signs, strict=True))) for signs in
            itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    assert found.signs == sum(value >= sum(differences) for value in sums) / 2 ** len(differences)
    assert found.ahead == 6 and found.effect == pytest.approx(30 / 7 / stats.tstd(differences))


def test_two_rows_differ_by_less_than_a_margin():
    """Against the two one-sided t-tests."""
    claim = Claim("they are alike", "full", "sft", margin=2.0)
    for differences, verdict in (
        ([0.3, -0.5, 0.4, 0.1, -0.2], "holds"),
        ([5.0, 5.5, 4.8, 5.1, 5.2], "does not hold"),
        ([-5.0, -5.5, -4.8, -5.1, -5.2], "does not hold"),
        ([3.0, -2.5, 0.5, 1.0, -0.5], "undecided"),
    ):
        low, high, p = equivalence(differences, 2.0)
        one_sided = [
            stats.ttest_1samp(differences, -2.0, alternative="greater").pvalue,
            stats.ttest_1samp(differences, 2.0, alternative="less").pvalue,
        ]
        bounds = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
        assert p == pytest.approx(max(one_sided)) and (low, high) == pytest.approx((bounds.low, bounds.high))
        scores = {"full": dict(enumerate(differences)), "sft": dict.fromkeys(range(5), 0.0)}
        found = judge(claim, scores)
        assert found.verdict == verdict and found.signs is None
        assert judge_family([found])[0].verdict == verdict


def test_claims_of_a_family_share_their_chance_of_error():
    """Holm's example: the smallest p times the number of claims, the next times one less, never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []
    near = judged([3.0, 1.0, 4.0, 0.5, 2.0])
    assert near.verdict == "holds" and 0.0125 < near.p < 0.05
    (alone,) = judge_family([near])
    assert alone.adjusted == near.p and alone.verdict == "holds"
    others = judge_family([near, *[judged([1.0, -1.0, 0.5])] * 3])
    assert others[0].adjusted == pytest.approx(4 * near.p) and others[0].verdict == "undecided"


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
def test_the_report_has_means_errors_and_the_papers_figures(tmp_path):
    world = FakeWorld()
    runs = run_grid(world, tmp_path / "runs", seeds=(0, 1, 2))
    found = report.collect(STUDY, runs, world, [0, 1, 2], {"default": world.evaluate(None)})
    teacher = {"cr": 99.0, "vqa": 98.25}
    paths = report.write([found], runs, world, tmp_path, "the command", about.environment(), teacher=teacher)
    assert "The teacher: " in paths[0].read_text() and " 99.0, " in paths[0].read_text()
    assert str(tmp_path) not in paths[1].read_text(), "results can be published"
    text = paths[0].read_text()
    error = 1 / math.sqrt(3)
    assert "# The paper's tables: a fake world" in text
    assert f"| CompoDistill | 71.0 ± {error:.1f} | 70.0 ± 0.0 | 3 | 70.0, 71.0, 72.0 | – | – |" in text
    assert "| Teacher | 90.0 | 95.0 | – | – | 62.6 | 70.3 |" in text and "A note." in text and "`the command`" in text
    assert "| it helps (compositional) | +10.0 | +10.0 to +10.0 | < 0.001 | **holds** |" in text
    assert "| it helps VQA (recognition) | +0.0 | +0.0 to +0.0 | 1.000 | undecided |" in text
    content = json.loads(paths[1].read_text())
    assert len(content["runs"]) == 6 and content["studies"]["table"]["scores"]["cr"]["full"] == {
        "0": 70.0, "1": 71.0, "2": 72.0,
    }  # fmt: skip
    assert content["studies"]["table"]["verdicts"][0]["verdict"] == "holds"


def test_a_family_shows_effects_and_the_gap_that_is_closed(tmp_path):
    world = FakeWorld()
    runs = run_grid(world, tmp_path / "runs", seeds=(0, 1, 2))
    study = replace(STUDY, family=True, gap=Gap("cr", "sft", "teacher"))
    found = report.collect(study, runs, world, [0, 1, 2], {"default": world.evaluate(None)})
    lines = report.markdown(found, world).split("\n")
    # From 61 to 90: 10 of 29 points, the same with every seed.
    assert any("gap closed (compositional)" in line for line in lines)
    (row,) = [line for line in lines if line.startswith("| CompoDistill ")]
    assert "| 34 % (34 to 34) |" in row
    (claim,) = [line for line in lines if line.startswith("| it helps (")]
    assert claim.split(" | ")[4:] == ["3 of 3", "< 0.001", "0.250", "< 0.001", "**holds** |"]
    assert [line for line in lines if "p (Holm): p corrected" in line]


def in_this_process(name, environment, flags, log, threads, on_log):
    """The command that a script would start, without another interpreter's imports."""
    command = ["bash", str(about.folder("scripts") / name), *flags]
    variables = {**os.environ, "PYTHON": sys.executable, **{key: str(value) for key, value in environment.items()}}
    printed = subprocess.run(command, env={**variables, "DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    arguments = printed.stdout.rstrip("\n").split("\n")
    train.main(arguments[arguments.index("llava_compodistill.train") + 1 :])
    return 1.0


@pytest.mark.once
@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
@pytest.mark.long
def test_a_table_of_the_miniature(tmp_path, monkeypatch, capsys):
    """A recipe through the real scripts, with half of the data; listed before and after."""
    study = Study("tiny", "Table 0: one", {"sft": Row("half", Recipe(("pt", "sft"), "sft", data=0.5))}, curve=3)
    monkeypatch.setattr(cli, "STUDIES", {"tiny": study})
    monkeypatch.chdir(Path(__file__).parents[1])  # the miniature is found in the checkout
    monkeypatch.setattr("miniature.reproduction.run_script", in_this_process)
    command = ["reproduce", "tiny", "--preset", "smoke", "--seeds", "5", "--output", str(tmp_path), "--jobs", "1"]
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.split()[-1] == "-"
    assert main(command) == 0
    assert "half" in capsys.readouterr().out
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.split()[-1] == "5"
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["steps"] == 12 and 0 <= run["scores"]["cr"] <= 100
    assert [steps for steps, _ in run["curve"]] == [6, 9, 12] and (tmp_path / "tiny-curves.png").is_file()
    assert not list((tmp_path / run["checkpoint"]).glob("checkpoint-*"))
    whole = json.loads((tmp_path / "data" / "instruct_student.json").read_text())
    manifest = json.loads((tmp_path / run["checkpoint"] / "data_manifest.json").read_text())
    assert manifest["samples"] == round(len(whole) / 2)


def test_bad_input(capsys):
    for arguments, message in (
        (["table99"], "unknown table99: there are table1"),
        (["table2", "--seeds", "a"], "--seeds a: must be numbers"),
        (["table2", "--preset", "huge"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert message in capsys.readouterr().err
