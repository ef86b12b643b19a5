"""Settings of the miniature experiment: presets, single changes, and runs that must not be mixed."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from llava_compodistill.reproduce.runner import StageFailed
from miniature import quickstart, report
from miniature.settings import METHODS, override, preset

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", ["default", "smoke", "gpu"])
def test_presets_name_known_methods_and_sum_their_steps(name):
    settings = preset(name)
    assert set(settings.methods) <= set(METHODS)
    assert settings.student_steps == settings.pretrain_steps + settings.distil_steps + settings.supervised_steps
    assert settings.teacher.hidden_size > settings.student.hidden_size


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset 'huge'"):
        preset("huge")


def test_single_settings_are_changed_in_their_type():
    settings = override(preset("smoke"), ["learning_rate=1e-4", "distil_steps=7", "kl_weight=2"])
    assert (settings.learning_rate, settings.distil_steps, settings.kl_weight) == (1e-4, 7, 2.0)
    assert settings.batch == preset("smoke").batch


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("speed=3", "no setting 'speed'"), ("world=3", "no setting 'world'"), ("batch=1.5", "'1.5' is no int")],
)
def test_wrong_changes_are_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(preset("smoke"), [assignment])
    assert quickstart.main(["--smoke", "--set", assignment]) == 2


def test_a_student_of_other_settings_is_not_read_back(tmp_path):
    settings = preset("smoke")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"method": "kd", "settings": quickstart.recipe(settings)}))
    assert quickstart.finished(path, settings)["method"] == "kd"
    with pytest.raises(StageFailed, match="another learning_rate: --force"):
        quickstart.finished(path, override(settings, ["learning_rate=1e-4"]))


def test_evaluations_are_kept_until_they_are_asked_for_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(report, "load_for_evaluation", lambda path: (None, None))
    monkeypatch.setattr(report, "_evaluate", lambda *given: made.append(given[0]) or {"number": len(made)})
    (tmp_path / "models" / "llava-teacher").mkdir(parents=True)

    def numbers(again):
        results = report.evaluate_runs(preset("smoke"), tmp_path, [], "val", Console(quiet=True), again=again)
        return [result["scores"]["number"] for result in results]

    assert [numbers(False), numbers(False), numbers(True), numbers(False)] == [[1], [1], [2], [2]]
