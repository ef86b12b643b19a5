"""Layers chosen by measured sight: where a model reads the image, in place of a fixed share of its depth.

The sight of a layer is what the loss rises by, in nats an answer token, when text does not see the image in that layer
alone (`record.sight` measures it). Pure arithmetic on these numbers; nothing here touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any

from .layers import layer_at_equal_depth, refuse_more_student_layers

#: A mean increase below so many standard errors is noise. Of 40 layers without sight one passes by chance in 5 of 100
#: measurements.
NOISE = 3.0
#: Nats an answer token; what is below may be rounding, which is alike in all samples.
LEAST = 1e-4
#: Fewer samples say too little about their spread.
LEAST_SAMPLES = 8


@dataclass(frozen=True)
class LayerSight:
    """The sight of a model's layers.

    Attributes:
        nats: by layer, the mean over samples of the increase of the loss, in nats an answer token.
        errors: by layer, the standard error of that mean.
        samples: their number.
    """

    nats: tuple[float, ...]
    errors: tuple[float, ...]
    samples: int

    @classmethod
    def of(cls, increases: Sequence[Sequence[float]]) -> LayerSight:
        """From the increases [samples][layers], at least two samples."""
        layers = list(zip(*increases, strict=True))
        count = len(increases)
        errors = (stdev(layer) / math.sqrt(count) for layer in layers)
        return cls(tuple(fmean(layer) for layer in layers), tuple(errors), count)

    def above_noise(self) -> list[float]:
        """The sight by layer, in nats; 0 where it is negative or within noise."""
        pairs = zip(self.nats, self.errors, strict=True)
        return [mean if mean > max(NOISE * error, LEAST) else 0.0 for mean, error in pairs]

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {"nats": list(self.nats), "errors": list(self.errors), "samples": self.samples}

    def __str__(self) -> str:
        pairs = zip(self.nats, self.errors, strict=True)
        return ", ".join(f"{layer}: {mean:.4f} ± {error:.4f}" for layer, (mean, error) in enumerate(pairs))


def shortest_run(sight: Sequence[float], share: float, least: int = 1) -> list[int]:
    """The shortest run of consecutive layers that holds a share of a model's sight.

    Of runs of one length, the one that holds most; of those that hold equally much, the first.

    Args:
        sight: by layer; what is not positive counts as 0.
        share: of the sum over all layers that the run has to hold, above 0 and at most 1.
        least: layers that it has at least.

    Raises:
        ValueError: for a share out of range, where no layer has sight, or more layers than there are.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if not any(value > 0 for value in sight):
        raise ValueError("no layer has sight: there is nothing to choose from")
    # Exact, as in `layers`: four layers of five alike hold 80 %, whatever floating point makes of 0.8 * 1.5.
    wanted = Fraction(str(share)) * _held(sight, range(len(sight)))
    lengths = range(least, len(sight) + 1)
    found = next((run for run in (best_run(sight, length) for length in lengths) if _held(sight, run) >= wanted), None)
    if found is None:
        raise ValueError(f"a run of {least} layers or more is asked for, and there are {len(sight)}")
    return found


def best_run(sight: Sequence[float], length: int) -> list[int]:
    """The consecutive layers of this number that hold most sight, the first of those that hold equally much.

    Raises:
        ValueError: for a number that the model does not have.
    """
    if not 1 <= length <= len(sight):
        raise ValueError(f"a run of {length} layers is asked for, and there are {len(sight)}")
    runs = [list(range(first, first + length)) for first in range(len(sight) - length + 1)]
    return max(runs, key=lambda run: _held(sight, run))  # the first of several


def share_of(sight: Sequence[float], layers: Sequence[int]) -> float:
    """The share of the positive sight of all layers that some layers hold; 0 where there is none."""
    total = _held(sight, range(len(sight)))
    return float(_held(sight, layers) / total) if total else 0.0


def _held(sight: Sequence[float], layers: Sequence[int]) -> Fraction:
    return sum((Fraction(sight[layer]) for layer in layers if sight[layer] > 0), Fraction(0))


@dataclass(frozen=True)
class Chosen:
    """The layers that are aligned, and for the log, how they were come by."""

    student_layers: list[int]
    teacher_layers: list[int]
    reasons: list[str]


def choose_layers(
    student: LayerSight | Sequence[int],
    teacher: LayerSight | Sequence[int],
    *,
    depths: tuple[int, int],
    share: float,
    strategy: str = "group",
) -> Chosen:
    """The layers of both models, of each by its sight or as they are given.

    Each run is the shortest that holds `share` of its model's sight. A student that does not read the image yet takes
    the layers at the relative depth of the teacher's. All strategies but `simple` need at least as many teacher layers
    as student layers: the student's run is narrowed to its best one of the teacher's length, or, where the student's
    layers are given, the teacher's run has at least their number.

    Args:
        student, teacher: the sight of its layers, or a list of layers.
        depths: layers of the student and of the teacher.
        strategy: as `match_layers` takes it.

    Raises:
        ValueError: for a teacher that does not read the image in any layer, and for lists that cannot be matched.
    """
    limited = strategy != "simple"
    reasons: list[str] = []
    if isinstance(teacher, LayerSight):
        least = len(student) if limited and not isinstance(student, LayerSight) else 1
        teacher = _teachers(teacher, share, least, reasons)
    if isinstance(student, LayerSight):
        student = _students(student, share, list(teacher), depths, limited, reasons)
    refuse_more_student_layers(student, teacher, strategy)
    return Chosen(list(student), list(teacher), reasons)


def _teachers(measured: LayerSight, share: float, least: int, reasons: list[str]) -> list[int]:
    sight = measured.above_noise()
    if not any(sight):
        raise ValueError(
            f"--teacher_layers sight: when text does not see the image in a layer, the teacher's loss on "
            f"{measured.samples} samples rises in none beyond noise ({measured}). Measure more samples "
            "(--calibration_samples), or name its layers (--teacher_layers intermediate, the paper's). If it does not "
            "look at the image at all (`llava-compodistill analyze knockout` tells), it has no attention to teach."
        )
    layers = shortest_run(sight, share)
    if len(layers) < least <= len(sight):
        reasons.append(f"the teacher's run, {_written(layers)}, is widened to the {least} layers of --student_layers")
        layers = shortest_run(sight, share, least)
    reasons.append(_held_by("teacher", sight, layers))
    return layers


def _students(
    measured: LayerSight, share: float, teacher: list[int], depths: tuple[int, int], limited: bool, reasons: list[str]
) -> list[int]:
    sight = measured.above_noise()
    if not any(sight):
        layers = sorted({layer_at_equal_depth(layer, depths[1], depths[0]) for layer in teacher})
        reasons.append(
            "the student does not read the image yet (no layer's sight is beyond noise) and takes the layers at the "
            f"teacher's relative depth, {_written(layers)}"
        )
        return layers
    layers = shortest_run(sight, share)
    if limited and len(layers) > len(teacher):
        reasons.append(
            f"the student reads the image in {_written(layers)}, and is narrowed to its best run of as many layers as "
            f"the teacher's {len(teacher)}"
        )
        layers = best_run(sight, len(teacher))
    reasons.append(_held_by("student", sight, layers))
    return layers


def _held_by(model: str, sight: Sequence[float], layers: Sequence[int]) -> str:
    return f"{100 * share_of(sight, layers):.0f} % of the {model}'s sight is in {_written(layers)}"


def _written(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
