"""`llava-compodistill reproduce evidence`: one budget of tuning, comparisons that are judged together, curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from llava_compodistill import about
from llava_compodistill.errors import DataError
from llava_compodistill.reproduce import cli, evidence, tuning
from llava_compodistill.reproduce.recipes import COMPODISTILL, KD, SFT

pytestmark = pytest.mark.once  # nothing here depends on transformers

BUDGET = tuning.Budget((1e-3, 2e-3), (1.0, 3.0), (100, 101))


class World:
    """Accuracy rises with the rate for CompoDistill and falls with it for the others."""

    name, title = "fake", "a fake world"
    metrics, more = {"cr": "compositional", "relations": "relation types"}, {}
    ahead, jobs, curve, band = 0, 1, 0, "early"

    def __init__(self, split="val"):
        self.split, self.rates = split, {}

    def settings(self):
        return {"world": "fake", "split": self.split}

    def normal(self, recipe):
        return recipe

    def models(self, recipe):
        return {}

    def refusal(self, recipe):
        return None

    def steps(self, recipe):
        return 3

    def stop(self):
        pass

    def prepare(self, recipes):
        pass

    def train(self, recipe, seed, folder, threads, on_log):
        self.rates[str(folder)] = recipe, seed
        found = {"checkpoint": str(folder), "seconds": 1.0, "steps": 3}
        ends = [[1, 50.0 + seed], [3, 60.0 + seed]]
        return {**found, "curve": ends} if self.curve else found

    def evaluate(self, checkpoint, teacher="default"):
        if checkpoint is None:
            return {"cr": 99.0, "relations": 99.0}
        recipe, seed = self.rates[str(checkpoint)]
        aligned = recipe.method == "compodistill" and not recipe.flags
        slope = 4000.0 if aligned else -4000.0
        value = 70.0 + (10.0 if aligned else 0.0) + slope * (recipe.rate or 1e-3) + seed % 100
        value += 1.0 if recipe.weight == 3 else 0.0
        return {"cr": value, "relations": value}


def tuned(root, world=None):
    return tuning.tune(
        world or World(), [evidence.EVIDENCE], BUDGET, root, 1, Console(quiet=True), about.environment()
    )


def test_every_method_is_tuned_with_the_same_budget(tmp_path):
    world = World()
    record = tuned(tmp_path, world)
    recipes = {row.recipe for row in evidence.EVIDENCE.rows.values() if row.recipe is not None}
    assert record["recipes"].keys() == {recipe.key for recipe in recipes} and len(recipes) == 4
    runs = [(recipe.method, recipe.flags, recipe.rate, recipe.weight, seed) for recipe, seed in world.rates.values()]
    assert len(runs) == len(set(runs)) == 4 * 4 * 2
    rates = [trial["rate"] for trial in record["recipes"][SFT.key]["trials"]]
    assert rates == [1e-3, 1.26e-3, 1.59e-3, 2e-3], "SFT has no weight, and as many trials"
    chosen = {key: (entry["rate"], entry["weight"]) for key, entry in record["recipes"].items()}
    assert chosen == {
        **{SFT.key: (1e-3, None), KD.key: (1e-3, 3.0), COMPODISTILL.key: (2e-3, 3.0)},
        evidence.CONTROL.key: (1e-3, 3.0),
    }
    assert record["recipes"][COMPODISTILL.key]["trials"] == [
        {"rate": 1e-3, "weight": None, "scores": [84.0, 85.0]},
        {"rate": 1e-3, "weight": 3.0, "scores": [85.0, 86.0]},
        {"rate": 2e-3, "weight": None, "scores": [88.0, 89.0]},
        {"rate": 2e-3, "weight": 3.0, "scores": [89.0, 90.0]},
    ]
    assert tuning.read_tuning(tmp_path) == record and record["environment"]["commit"]
    section = tuning.tuning_section([evidence.EVIDENCE], record, world)
    row = "| 0.001: 84.5 (84.0, 85.0) | 0.001 × 3: 85.5 (85.0, 86.0) | 0.002: 88.5 (88.0, 89.0) | **0.002 × 3: "
    assert f"| CompoDistill {row}" in section and "the same 4 trials with the seeds 100, 101" in section


def test_rows_take_the_rates_that_were_chosen_for_them(tmp_path):
    record, world = tuned(tmp_path), World()
    study = tuning.at_tuned_rates(evidence.EVIDENCE, record, world)
    rates = {name: row.recipe.rate for name, row in study.rows.items() if row.recipe is not None}
    assert rates == {"sft": 1e-3, "kd": 1e-3, "compodistill": 2e-3, "control": 1e-3}
    assert study.rows["kd"].recipe.weight == 3
    second = tuning.at_tuned_rates(evidence.SECOND, record, world).rows["compodistill"].recipe
    assert (second.teacher, second.rate, second.weight) == ("second", 2e-3, 3), "with what was chosen with the first"
    beyond = tuning.at_tuned_rates(evidence.BEYOND, record, world).rows
    variants = [row.recipe for name, row in beyond.items() if name not in ("teacher", "sft")]
    assert {(recipe.rate, recipe.weight) for recipe in variants} == {(2e-3, 3)}, "what was chosen for the method"
    del record["recipes"][KD.key]
    with pytest.raises(DataError, match="no learning rate for “KD” of evidence: run `reproduce evidence --tune"):
        tuning.at_tuned_rates(evidence.EVIDENCE, record, world)


def test_every_claim_names_rows_of_its_study():
    for study in evidence.STUDIES.values():
        for claim in study.claims:
            assert {claim.better, claim.worse} <= study.rows.keys() and claim.metric in study.metrics, claim
        assert study.family and study.seeds >= 8 and {study.gap.bottom, study.gap.top} <= study.rows.keys()
        recipes = [row.recipe for row in study.rows.values() if row.recipe is not None]
        assert len({recipe.key for recipe in recipes}) == len(recipes)


def test_studies_that_are_tuned_one_after_the_other_share_the_file(tmp_path):
    first = tuned(tmp_path)
    quiet = Console(quiet=True)
    more = tuning.tune(World(), [evidence.OBJECTIVE], BUDGET, tmp_path, 1, quiet, {"commit": "b"})
    assert more["recipes"].items() >= first["recipes"].items() and len(more["recipes"]) == 7
    tuning.at_tuned_rates(evidence.EVIDENCE, more, World("test"))
    # Rows that were tuned already are not tuned again, at whatever rates; new rows have as many trials.
    world = World()
    rates = tuning.Budget((4e-3, 6e-3), (1.0, 3.0), BUDGET.seeds)
    faster = tuning.tune(world, [evidence.FASTER], rates, tmp_path, 1, quiet, about.environment())
    assert faster["recipes"].items() >= more["recipes"].items() and len(faster["recipes"]) == 10
    commits = {entry["commit"] for entry in faster["recipes"].values()}
    assert commits == {"b", about.environment()["commit"]}, "each of its own tuning"
    assert {recipe.rate for recipe, _ in world.rates.values()} == {4e-3, 6e-3}
    assert {recipe.steps for recipe, _ in world.rates.values()} == {0.5}
    # With another number of trials nothing of before could stand beside it.
    with pytest.raises(DataError, match=r"tuned with 4 trials each, and this would be 1: give as many"):
        tuning.tune(World(), [evidence.OBJECTIVE], tuning.Budget((1e-3,)), tmp_path, 1, quiet, about.environment())
    assert tuning.read_tuning(tmp_path) == faster
    other = World()
    other.settings = lambda: {"world": "another", "split": "test"}
    with pytest.raises(DataError, match="made with other settings of the world"):
        tuning.at_tuned_rates(evidence.OBJECTIVE, faster, other)


@pytest.mark.parametrize("text", ["", "[]", '{"recipes": {"a": {}}}', '{"recipes": {}}'])
def test_a_damaged_tuning_file_is_named(tmp_path, text):
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(DataError, match="tuning.json is not what `reproduce --tune` writes"):
        tuning.read_tuning(tmp_path)


def test_the_command_tunes_and_then_decides(tmp_path, monkeypatch, capsys):
    worlds = []

    def make(preset, root, file, split):
        worlds.append(World(split))
        return worlds[-1]

    monkeypatch.setattr(cli, "make_world", make)
    command = ["evidence", "--output", str(tmp_path), "--jobs", "1"]
    assert cli.main([*command, "--tune", "1e-3,2e-3", "--tune-weights", "1,3"]) == 0
    assert worlds[-1].split == "val" and not (tmp_path / "report.md").exists(), "nothing is said of the test split"
    assert cli.main(command) == 0
    assert worlds[-1].split == "test" and {seed for _, seed in worlds[-1].rates.values()} == set(range(8))
    report = (tmp_path / "report.md").read_text()
    assert "## How each method was tuned" in report and "evidence-curves.png" in report
    assert (tmp_path / "evidence-curves.png").stat().st_size > 10_000
    assert "| CompoDistill is ahead of KD (relation types) | +22.0 |" in report and "p (Holm)" in report
    content = json.loads((tmp_path / "results.json").read_text())
    found = {verdict["claim"]["better"]: verdict for verdict in content["studies"]["evidence"]["verdicts"]}
    assert found["compodistill"]["verdict"] == "holds" and found["control"]["verdict"] == "holds"
    assert content["runs"][0]["curve"] == [[1, 50.0], [3, 60.0]]
    assert content["tuning"]["seeds"] == [100, 101]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evidence", "--tune", "fast"], "--tune fast: must be numbers separated by commas, such as 1e-3,2e-3"),
        (["evidence", "--tune", "1e-3", "--tune-weights", "-1"], "--tune-weights -1: factors are greater than 0"),
        (["evidence", "--tune-weights", "2"], "--tune-weights: goes with --tune RATES"),
        (["evidence", "--tune", "0"], "--tune 0: learning rates are greater than 0"),
        (["evidence", "--tune", "1e-3", "--preset", "gpu"], "needs a table, and a world with a validation split"),
        (["figure2", "--tune", "1e-3"], "needs a table"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_students_that_differ_in_their_seed_share_a_cache(tmp_path, monkeypatch):
    from miniature import caches

    made = []

    def run_command(asked, environment, log):
        made.append(asked)
        folder = Path(asked[asked.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(b"12345")
        return 1.0

    monkeypatch.setattr(caches, "run_command", run_command)
    places = {"STUDENT": tmp_path, "TEACHER": tmp_path, "TOWER": tmp_path, "DATA": "d.json", "IMAGES": tmp_path}
    (tmp_path / "mm_projector.bin").touch()

    def cached(options, seed, *flags):
        settings = {**places, "DPT": tmp_path, "OUTPUT": tmp_path / f"student-{seed}", "PRECISION": "fp32"}
        return caches.cache_once(tmp_path, options, "dft.sh", settings, ["--seed", str(seed), *flags], 1)

    first = cached("--top_k 4 --map_bits 4", 0, "--max_steps", "5")
    assert first["bytes"] == 5 and cached("--top_k 4 --map_bits 4", 1) == first and len(made) == 1
    assert made[0][:5] == ["cache", "--output", first["folder"], "--top_k", "4"]
    assert "llava_compodistill.train" in made[0] and made[0][made[0].index("--stage") + 1] == "dft"
    others = [cached("--top_k 8", 0), cached("--top_k 4 --map_bits 4", 0, "--attention_rows", "answer")]
    assert len({first["folder"], *(other["folder"] for other in others)}) == 3
