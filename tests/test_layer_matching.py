"""Bands and matchings, against the tables of the paper and the definitions."""

import random

import pytest
import torch

from llava_compodistill.pair.layers import match_layers, visual_understanding_layers

pytestmark = pytest.mark.once  # nothing here depends on transformers


@pytest.mark.parametrize(
    ("num_layers", "first", "last"),
    [(10, 3, 6), (24, 8, 16), (28, 9, 19), (32, 10, 22), (40, 12, 27)],
)
def test_intermediate_band(num_layers, first, last):
    assert visual_understanding_layers(num_layers) == list(range(first, last + 1))


@pytest.mark.parametrize("num_layers", [4, 7, 10, 20, 24, 28, 30, 32, 36, 40, 70, 80, 100])
def test_bands_partition_the_model_in_exact_arithmetic(num_layers):
    bands = [visual_understanding_layers(num_layers, band) for band in ("early", "intermediate", "later")]
    assert sum(bands, []) == visual_understanding_layers(num_layers, "all") == list(range(num_layers))
    for layer in range(num_layers):
        expected = 0 if 10 * layer < 3 * num_layers else 1 if 10 * layer < 7 * num_layers else 2
        assert layer in bands[expected]


def test_explicit_band():
    assert visual_understanding_layers(24, [0, 5, 23]) == [0, 5, 23]
    assert visual_understanding_layers(24, range(3, 6)) == [3, 4, 5]


@pytest.mark.parametrize(
    ("num_layers", "band", "message"),
    [
        (24, "middle", "intermediate"),
        (24, [], "empty"),
        (24, [5, 24], "24 layers"),
        (24, [-1, 3], "outside"),
        (24, [5, 3], "ascending"),
        (24, [5, 5], "ascending"),
        (24, [0.5], "integers"),
        (1, "intermediate", "empty"),
        (0, "all", "positive"),
        (2.0, "all", "positive"),
    ],
)
def test_band_errors(num_layers, band, message):
    with pytest.raises(ValueError, match=message):
        visual_understanding_layers(num_layers, band)


def test_group_on_the_main_pair():
    groups = match_layers(visual_understanding_layers(24), visual_understanding_layers(40))
    assert len(groups) == 9
    assert groups[0] == list(range(12, 20)) and groups[1] == list(range(13, 21)) and groups[8] == list(range(20, 28))


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 5), (4, 4), (9, 16), (11, 13)])
def test_group_uses_every_teacher_layer_with_equal_windows(student, teacher):
    band = list(range(7, 7 + teacher))
    groups = match_layers(range(student), band, "group")
    assert {len(group) for group in groups} == {teacher - student + 1}
    assert [group[0] for group in groups] == band[:student]
    assert sorted({layer for group in groups for layer in group}) == band
    assert all(group == list(range(group[0], group[-1] + 1)) for group in groups)


def test_simple():
    assert match_layers([8, 9, 10], [12, 13, 14, 15, 16], "simple") == [[12], [14], [16]]
    assert match_layers([4], [12, 13, 14], "simple") == [[13]]
    assert match_layers([1, 2, 3], [5, 6], "simple") == [[5], [6], [6]]
    nine = match_layers(range(9), range(12, 28), "simple")
    assert nine[0] == [12] and nine[-1] == [27] and all(len(group) == 1 for group in nine)
    steps = {b[0] - a[0] for a, b in zip(nine, nine[1:], strict=False)}
    assert steps == {1, 2}  # 15/8 apart, rounded


def test_adaptive_takes_the_nearest_later_layer():
    distances = [[5, 1, 2, 9], [0, 0, 3, 1]]  # the second layer may not go back to teacher layer 10 or 11
    assert match_layers([3, 4], [10, 11, 12, 13], "adaptive", distances) == [[11], [13]]
    assert match_layers([3, 4], [10, 11, 12, 13], "adaptive", torch.tensor(distances)) == [[11], [13]]


def test_adaptive_leaves_enough_teacher_layers():
    distances = [[9, 9, 9, 0]] * 3  # everyone wants the last one
    assert match_layers([0, 1, 2], [4, 5, 6, 7], "adaptive", distances) == [[4], [5], [7]]


def test_adaptive_is_the_greedy_definition_on_random_distances():
    rng = random.Random(0)
    for _ in range(50):
        student, teacher = rng.randint(1, 5), rng.randint(5, 9)
        distances = [[rng.random() for _ in range(teacher)] for _ in range(student)]
        chosen = [group[0] for group in match_layers(range(student), range(teacher), "adaptive", distances)]
        previous = -1
        for k, layer in enumerate(chosen):
            allowed = [t for t in range(previous + 1, teacher) if teacher - 1 - t >= student - 1 - k]
            assert distances[k][layer] == min(distances[k][t] for t in allowed) and layer in allowed
            previous = layer


@pytest.mark.parametrize("strategy", ["group", "adaptive"])
def test_too_few_teacher_layers_names_both_bands_and_the_way_out(strategy):
    with pytest.raises(ValueError) as error:
        match_layers([8, 9, 10], [3, 4], strategy, [[0, 0]] * 3)
    for part in ("[8, 9, 10]", "[3, 4]", "another band", "'simple'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [2], "nearest"), "group, simple, adaptive"),
        (([], [2]), "student_layers is empty"),
        (([1], []), "teacher_layers is empty"),
        (([2, 1], [2, 3]), "ascending"),
        (([1], [2, 3], "adaptive"), "needs distances"),
        (([1], [2, 3], "adaptive", [[1.0]]), r"\[1\]\[2\]"),
        (([1], [2, 3], "adaptive", [[1.0, 2.0], [1.0, 2.0]]), r"\[1\]\[2\]"),
        (([1], [2, 3], "adaptive", [[1.0, float("nan")]]), "NaN"),
    ],
)
def test_matching_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_layers(*arguments)
