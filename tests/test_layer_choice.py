"""Layers chosen by sight, on profiles made by hand: the run, the noise, and the two models together."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations_with_replacement
from types import SimpleNamespace

import pytest

from llava_compodistill.pair.layers import parse_band
from llava_compodistill.pair.sight import LEAST, LayerSight, best_run, choose_layers, share_of, shortest_run

pytestmark = pytest.mark.once  # nothing here depends on transformers


@pytest.mark.parametrize(
    ("sight", "share", "run"),
    [
        ([9, 0, 0, 0, 0], 0.9, [0]),  # one peak, at either end
        ([0.1, 0, 0, 0, 9], 0.9, [4]),
        ([0, 1, 8, 1, 0], 0.9, [1, 2]),  # the first of two that hold equally much
        ([0, 1, 8, 2, 0], 0.9, [2, 3]),  # the one of two that holds more
        ([1, 1, 1, 1, 1], 0.8, [0, 1, 2, 3]),  # flat
        ([1, 1, 1, 1, 1], 0.81, [0, 1, 2, 3, 4]),
        ([0.3, 0.3, 0.3, 0.3, 0.3], 0.8, [0, 1, 2, 3]),  # 4 * 0.3 is less than 0.8 * 1.5 in floating point
        ([5, 0, 0, 0, 0, 5], 0.9, [0, 1, 2, 3, 4, 5]),  # two peaks, and both are needed
        ([5, 0, 0, 0, 0, 5], 0.5, [0]),
        ([9, 0, 0, 0, 0, 5, 5], 0.5, [5, 6]),  # two layers hold more than the highest peak
        ([0, -3, 2, -1, 2, 0], 1, [2, 3, 4]),  # what is negative takes nothing away
        ([7], 0.9, [0]),
        ([1, 2, 3], 1, [0, 1, 2]),
        ([0, 0, 3, 0], 1e-9, [2]),
    ],
)
def test_the_shortest_run_that_holds_the_share(sight, share, run):
    assert shortest_run(sight, share) == run


def test_a_run_is_the_shortest_of_all_that_hold_the_share():
    """Against all runs, on random profiles with ties."""
    rng = random.Random(0)
    for _ in range(300):
        sight = [rng.choice([-1, 0, 0, 1, 2, 5]) for _ in range(rng.randint(1, 9))]
        positive = [max(0, value) for value in sight]
        if not any(positive):
            continue
        share, least = rng.choice([0.1, 0.5, 0.9, 1.0]), rng.randint(1, len(sight))
        runs = [
            (last - first + 1, -sum(positive[first : last + 1]), first)
            for first, last in combinations_with_replacement(range(len(sight)), 2)
            if last - first + 1 >= least and sum(positive[first : last + 1]) >= Fraction(str(share)) * sum(positive)
        ]
        length, _, first = min(runs)
        assert shortest_run(sight, share, least) == list(range(first, first + length)), (sight, share, least)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], 0.9), "no layer has sight"),
        (([-1, 0], 0.9), "no layer has sight"),
        (([1], 0), "share must be above 0 and at most 1, got 0"),
        (([1], 1.1), "got 1.1"),
        (([1, 2], 0.9, 3), "a run of 3 layers or more is asked for, and there are 2"),
    ],
)
def test_runs_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        shortest_run(*arguments)
    with pytest.raises(ValueError, match="a run of 3 layers is asked for, and there are 2"):
        best_run([1, 2], 3)


def test_the_share_of_a_run():
    assert share_of([1, 3, -2, 4], [1, 2]) == 3 / 8
    assert share_of([0, -1], [0, 1]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------
def test_mean_and_standard_error_by_layer():
    found = LayerSight.of([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 0.6]])
    assert found.nats == pytest.approx((2.0, 0.15)) and found.samples == 4
    assert found.errors == pytest.approx((math.sqrt(2 / 3) / 2, 0.15))  # sd = 0.3
    assert found.above_noise() == [pytest.approx(2.0), 0], "the one sample that reads in layer 1 is no evidence"
    assert str(found) == "0: 2.0000 ± 0.4082, 1: 0.1500 ± 0.1500"


def test_what_is_noise():
    def above(mean, error):
        return LayerSight((mean,), (error,), 16).above_noise()[0]

    assert above(0.31, 0.1) == 0.31 and above(0.29, 0.1) == 0
    assert above(-5.0, 0.1) == 0
    assert above(0.5, 0.0) == 0.5 and above(0.0, 0.0) == 0
    assert above(0.9 * LEAST, 0.0) == 0, "rounding can be alike in all samples"


def test_pure_noise_is_seldom_taken_for_sight():
    rng = random.Random(0)
    false = 0
    for _ in range(100):
        profile = LayerSight.of([[rng.gauss(0, 1) for _ in range(40)] for _ in range(32)])
        false += any(profile.above_noise())
    assert false <= 15


# ---------------------------------------------------------------------------------------------------------------------
# Both models
# ---------------------------------------------------------------------------------------------------------------------
def seen(*nats):
    return LayerSight(tuple(map(float, nats)), (0.01,) * len(nats), 32)


def blind(layers):
    return LayerSight((0.01, -0.02, *(0.0,) * (layers - 2)), (0.01,) * layers, 32)


def choose(student, teacher, depths, share=0.9, strategy="group"):
    found = choose_layers(student, teacher, depths=depths, share=share, strategy=strategy)
    return found.student_layers, found.teacher_layers, "; ".join(found.reasons)


def test_each_model_has_its_own_run():
    student, teacher, log = choose(seen(0, 2, 0, 0), seen(0, 0, 0, 1, 1, 0.1), (4, 6))
    assert (student, teacher) == ([1], [3, 4])
    assert log == "95 % of the teacher's sight is in layers 3, 4; 100 % of the student's sight is in layer 1"


@pytest.mark.parametrize(
    ("depths", "nats", "student"),
    [
        ((4, 8), (0, 0, 1, 1, 1, 0, 0, 0), [1, 2]),
        ((6, 6), (0, 0, 1, 1, 0, 0), [2, 3]),
        ((2, 8), (0, 0, 0, 0, 0, 0, 0, 1), [1]),  # a run narrower than one of the student's layers
        ((8, 4), (0, 1, 1, 0), [3, 5]),  # a deeper student: as many layers as the teacher's, as far apart
    ],
)
@pytest.mark.parametrize("strategy", ["group", "simple", "adaptive"])
def test_a_student_that_does_not_read_takes_the_teachers_depth(depths, nats, student, strategy):
    found, _, log = choose(blind(depths[0]), seen(*nats), depths, strategy=strategy)
    assert found == student and "does not read the image yet" in log
    given = [layer for layer, value in enumerate(nats) if value]
    assert choose(blind(depths[0]), given, depths, strategy=strategy)[:2] == (student, given)


def test_a_student_is_narrowed_to_the_teachers_number():
    wide, narrow = seen(1, 1, 3, 3, 1, 1), seen(0, 0, 5, 5, 0, 0)
    for strategy in ("group", "adaptive"):
        student, teacher, log = choose(wide, narrow, (6, 6), strategy=strategy)
        assert (student, teacher) == ([2, 3], [2, 3])
        assert "reads the image in layers 0 to 4, and is narrowed" in log and "60 % of the student's" in log
    assert choose(wide, narrow, (6, 6), strategy="simple")[:2] == ([0, 1, 2, 3, 4], [2, 3])
    assert choose(wide, [4], (6, 6))[:2] == ([2], [4]), "also to a list"


def test_a_teachers_run_is_widened_to_given_student_layers():
    teacher = seen(0, 4, 0, 0, 1, 0)
    student, found, log = choose([0, 1, 2], teacher, (4, 6), share=0.5)
    assert (student, found) == ([0, 1, 2], [0, 1, 2])
    assert "the teacher's run, layer 1, is widened to the 3 layers of --student_layers" in log
    assert choose([0, 1, 2], teacher, (4, 6), share=0.5, strategy="simple")[1] == [1]
    with pytest.raises(ValueError, match="student band .* has 7 and the teacher band .* has 1.*'simple'"):
        choose(list(range(7)), teacher, (8, 6), share=0.5)


def test_a_teacher_that_does_not_read_is_refused():
    message = (
        r"--teacher_layers sight: .* 32 samples .* none beyond noise \(0: 0.0100 ± 0.0100, .*--calibration_samples"
    )
    with pytest.raises(ValueError, match=message):
        choose(seen(1, 1), blind(6), (2, 6))


def test_layers_with_a_window_cannot_be_chosen(tmp_path):
    """The map of a layer that does not see the whole sequence is not recorded, so that layer is no candidate."""
    from llava_compodistill.pair import Pair
    from llava_compodistill.train.arguments import TrainingArguments
    from llava_compodistill.train.rehearsal import ConfigOnly

    values = {"num_hidden_layers": 3, "sliding_window": 16, "tokenizer_model_max_length": 64}
    config = SimpleNamespace(**values, layer_types=["full_attention", "full_attention", "sliding_attention"])
    pair = Pair(*(ConfigOnly(config, SimpleNamespace(num_patches=4)) for _ in range(2)))

    def prepare(student, teacher):
        options = {"student_layers": student, "teacher_layers": teacher, "stage": "dft"}
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
        (term,) = (term for term in args.chosen_method.terms("dft", args) if term.name == "attention")
        term.prepare(pair)

    prepare("0,1", "0,1")
    for bands in (("0", "sight"), ("sight", "0")):
        with pytest.raises(ValueError, match="Layer 2 attends within a window of 16 tokens"):
            prepare(*bands)


def test_sight_is_a_band_of_training_alone():
    assert parse_band("sight", "student_layers", measured=True) == "sight"
    with pytest.raises(ValueError, match="--band 'sight': unknown band"):
        parse_band("sight", "band")
    with pytest.raises(ValueError, match=r"--student_layers 'site': .*intermediate.*\(or sight: where"):
        parse_band("site", "student_layers", measured=True)
