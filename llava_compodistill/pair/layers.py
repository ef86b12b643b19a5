"""Which layers are distilled, and which teacher layers each student layer learns from (paper, Section 4.1, App. F).

Pure index arithmetic on 0-based layer numbers; nothing here touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

BANDS = ("early", "intermediate", "later", "all")
STRATEGIES = ("group", "simple", "adaptive")
#: In place of a band: the layers where the model is measured to read the image (`pair.sight`).
SIGHT = "sight"

# The middle 30-70 % of the depth. Fractions, because 0.7 * 10 == 7.000000000000001 in floating point, which would
# add layer 7 to the band of a 10-layer model.
_BAND_START = Fraction(3, 10)
_BAND_END = Fraction(7, 10)


def visual_understanding_layers(num_layers: int, band: str | Sequence[int] = "intermediate") -> list[int]:
    """The 0-based layers of a band of an LLM with ``num_layers`` layers, in ascending order.

    * ``"early"``: l < 0.3 L; ``"intermediate"`` (the paper's visual understanding layers): 0.3 L <= l < 0.7 L;
      ``"later"``: l >= 0.7 L; ``"all"`` (Table 3b).
    * a sequence of integers is checked (strictly ascending, inside the model) and returned as a list.

    Raises ``ValueError`` for an unknown band, an empty band and layers outside the model.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers must be a positive integer, got {num_layers!r}")
    if not isinstance(band, str):
        return _explicit_layers(num_layers, band)

    start, end = _BAND_START * num_layers, _BAND_END * num_layers
    if band == "early":
        layers = [layer for layer in range(num_layers) if layer < start]
    elif band == "intermediate":
        layers = [layer for layer in range(num_layers) if start <= layer < end]
    elif band == "later":
        layers = [layer for layer in range(num_layers) if layer >= end]
    elif band == "all":
        layers = list(range(num_layers))
    else:
        raise ValueError(f"unknown band {band!r}; allowed: {', '.join(BANDS)}, or an explicit list of layers")
    if not layers:
        raise ValueError(
            f"the {band} band of a model with {num_layers} layer(s) is empty; give explicit layers or 'all'"
        )
    return layers


def layer_at_equal_depth(layer: int, num_layers: int, other_num_layers: int) -> int:
    """The layer of another model whose middle is nearest to this layer's in relative depth."""
    return min(other_num_layers - 1, int((layer + 0.5) * other_num_layers / num_layers))


def parse_band(value: str, name: str = "band", measured: bool = False) -> str | list[int]:
    """Read a band from the command line: a name, or layer numbers separated by commas.

    Args:
        measured: whether SIGHT is allowed, too.

    Raises:
        ValueError: with the flag's name, the value, and what is allowed.
    """
    if measured and value == SIGHT:
        return SIGHT
    if any(character.isdigit() for character in value):
        try:
            return [int(number) for number in value.split(",")]
        except ValueError:
            raise ValueError(f"--{name} {value!r}: a list of layers reads like 8,9,10.") from None
    try:
        visual_understanding_layers(10, value)
    except ValueError as error:
        more = f" (or {SIGHT}: where the model reads the image)" if measured else ""
        raise ValueError(f"--{name} {value!r}: {error}{more}") from None
    return value


def match_layers(
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    strategy: str = "group",
    distances: Sequence[Sequence[float]] | None = None,
) -> list[list[int]]:
    """The teacher layers whose mean map is the target of each student layer: one list per student layer, in order.

    With K_S student and K_T teacher layers:

    * ``"group"`` (the paper's group layer matching): a window of m = K_T - K_S + 1 teacher layers slides with stride
      1, so that every teacher layer is used; needs K_S <= K_T.
    * ``"simple"``: K_S teacher layers spread evenly over the band, first and last included when K_S > 1 (one student
      layer takes the middle). A layer is used more than once when K_S > K_T.
    * ``"adaptive"`` (Appendix F): greedily, in order, the teacher layer with the smallest ``distances[k][t]``
      ([K_S][K_T], any float-convertible entries, tensors included) among those after the one taken before, always
      leaving one for each student layer still to come; ties go to the earlier layer; needs K_S <= K_T.

    Raises ``ValueError`` that names both bands when they cannot be matched.
    """
    student, teacher = _band("student_layers", student_layers), _band("teacher_layers", teacher_layers)
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown layer matching strategy {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    if strategy == "simple":
        return [[teacher[i]] for i in _spread(len(student), len(teacher))]

    refuse_more_student_layers(student, teacher, strategy)
    if strategy == "group":
        window = len(teacher) - len(student) + 1
        return [teacher[k : k + window] for k in range(len(student))]
    return [[teacher[i]] for i in _greedy(_checked_distances(distances, student, teacher))]


def refuse_more_student_layers(student: Sequence[int], teacher: Sequence[int], strategy: str) -> None:
    """Refuse bands that only `simple` can match.

    Raises:
        ValueError: naming both and the way out.
    """
    if strategy != "simple" and len(student) > len(teacher):
        raise ValueError(
            f"{strategy} layer matching needs at least as many teacher layers as student layers, but the student band "
            f"{student} has {len(student)} and the teacher band {teacher} has {len(teacher)}; "
            "choose another band for either model, or the strategy 'simple'"
        )


def _spread(count: int, size: int) -> list[int]:
    """``count`` indices spread evenly over range(size); halves are rounded up, in integers."""
    if count == 1:
        return [(size - 1) // 2]
    return [(2 * k * (size - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]


def _greedy(distances: list[list[float]]) -> list[int]:
    num_student, num_teacher = len(distances), len(distances[0])
    chosen: list[int] = []
    for k, row in enumerate(distances):
        first = chosen[-1] + 1 if chosen else 0
        end = num_teacher - (num_student - 1 - k)  # one layer is kept for each student layer still to come
        chosen.append(min(range(first, end), key=row.__getitem__))
    return chosen


def _checked_distances(
    distances: Sequence[Sequence[float]] | None, student: list[int], teacher: list[int]
) -> list[list[float]]:
    expected = (
        f"a [{len(student)}][{len(teacher)}] matrix for the student band {student} and the teacher band {teacher}"
    )
    if distances is None:
        raise ValueError(f"adaptive layer matching needs distances, {expected}")
    matrix = [[float(value) for value in row] for row in distances]
    widths = sorted({len(row) for row in matrix})
    if len(matrix) != len(student) or widths != [len(teacher)]:
        raise ValueError(f"distances must be {expected}; got {len(matrix)} row(s) of length(s) {widths}")
    if any(math.isnan(value) for row in matrix for value in row):
        raise ValueError("distances hold NaN; a layer's map had no counted row or was not finite")
    return matrix


def _explicit_layers(num_layers: int, layers: Sequence[int]) -> list[int]:
    result = _band("band", layers)
    if result[0] < 0 or result[-1] >= num_layers:
        raise ValueError(f"layers {result} are outside a model with {num_layers} layers (0 to {num_layers - 1})")
    return result


def _band(name: str, layers: Sequence[int]) -> list[int]:
    result = list(layers)
    if not result:
        raise ValueError(f"{name} is empty; at least one layer is needed")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in result):
        raise ValueError(f"{name} must hold integers, got {result!r}")
    if any(a >= b for a, b in zip(result, result[1:], strict=False)):
        raise ValueError(f"{name} must be strictly ascending, got {result}")
    return result
