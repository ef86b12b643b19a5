"""Before training: what terms look at to choose, say, the layers and heads that correspond; and the file in which
checkpoints keep it.

A run that goes on takes what its checkpoint has: the student has changed since, and a command with another micro-batch
would look at other samples.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, NonFiniteLossError
from ..hosts.files import read_object
from ..hosts.llava.model import decoder_layers
from ..pair.sight import LEAST_SAMPLES, LayerSight
from ..pair.tokens import students_inputs, teachers_inputs
from ..record.encoding import encode_alone, encode_for, encode_separately
from ..record.forward import Needs, Pass, record
from ..record.sight import sight_by_layer
from .resume import CALIBRATION_FILE
from .sight import can_measure, with_different_images

if TYPE_CHECKING:
    from .objective import Objective

logger = logging.getLogger(__name__)


class Calibration:
    """What a term may look at before training (`Term.calibrate`).

    Args:
        objective: whose models are run, in evaluation mode.
        batches: as in training.
        with_image: batches of samples with an image.
    """

    def __init__(
        self, objective: Objective, batches: Sequence[Mapping[str, Any]], with_image: Sequence[Mapping[str, Any]] = ()
    ):
        self._objective, self._batches, self._with_image = objective, batches, with_image
        self._sight: dict[str, LayerSight] = {}

    def passes(self, count: int, needs: tuple[Needs, Needs]) -> Iterator[tuple[Pass, Pass | None]]:
        """Both models' passes over the first batches, one batch at a time: maps of many layers are large.

        Args:
            needs: of the student and of the teacher.
        """
        objective = self._objective
        student = objective.pair.student
        for inputs in islice(self._batches, count):
            with encode_for(objective.pair), record(student, needs[0], **objective.options) as recorder:
                teacher = objective.run_teacher(inputs, needs[1])
                student(**students_inputs(inputs))
                yield recorder.latest, teacher

    def sight(self, of: str) -> LayerSight:
        """The sight of the layers of the `student` or the `teacher`; measured once, whoever asks.

        Raises:
            ValueError: where too few samples have an image.
            NonFiniteLossError: where the loss is no number.
        """
        if of not in self._sight:
            self._sight[of] = self._measure(of)
        return self._sight[of]

    def _measure(self, of: str) -> LayerSight:
        pair = self._objective.pair
        model = getattr(pair, of)
        layers = len(decoder_layers(model))
        forwards = len(self._with_image) * (layers + 1)
        logger.info("Measuring the sight of the %s's %d layers: %d forwards.", of, layers, forwards)
        start = time.monotonic()
        alone = of == "student" or pair.shares_encoder
        with encode_alone(model) if alone else encode_separately(pair.student, model):
            increases = sight_by_layer(model, self._inputs(of))
        if len(increases) < LEAST_SAMPLES:
            raise ValueError(
                f"{', '.join(self._objective.calibrated_by.values())}: the data have {len(increases)} samples with an "
                f"image of their own and an answer, and sight is measured on {LEAST_SAMPLES} or more. Use data with "
                "images, or other values for these flags."
            )
        if not all(math.isfinite(value) for sample in increases for value in sample):
            raise NonFiniteLossError(f"The {of}'s loss is not finite on the samples that its sight is measured on.")
        found = LayerSight.of(increases)
        logger.info(
            "Sight of the %s by layer, in nats an answer token ± standard error (%d samples, %d forwards, %.1f s): %s",
            *(of, found.samples, forwards, time.monotonic() - start, found),
        )
        return found

    def _inputs(self, of: str) -> Iterator[dict[str, Any]]:
        for batch in self._with_image:
            if of == "student":
                yield students_inputs(batch)
            else:
                inputs = teachers_inputs(batch, self._objective.pair.shares_tokenizer)
                yield {name: value for name, value in inputs.items() if name != "aligned"}


class Batches(Sequence):
    """Samples of a data set in batches, each made when it is asked for.

    Args:
        indices: of the samples.
        size: samples a batch.
        make: makes a batch of samples.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], size: int, make: Callable[[list[Any]], dict[str, Any]]):
        self._dataset, self._make = dataset, make
        self._parts = [indices[start : start + size] for start in range(0, len(indices), size)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self._make([self._dataset[index] for index in self._parts[place]])


def samples_with_image(dataset: Any, wanted: int, seed: int) -> Sequence[int]:
    """Samples with an image, no two with the same, drawn from all of the data. Of a data set that does not say which
    have one, the first samples."""
    if can_measure(dataset):
        return with_different_images(dataset.list_data_dict, wanted, seed)
    return range(min(wanted, len(dataset)))


def refuse_zero3(calibrated_by: Mapping[str, str]) -> None:
    """Refuse to calibrate where ZeRO-3 has the student's weights.

    Raises:
        ValueError: naming the flags that ask for it.
    """
    if calibrated_by:
        raise ValueError(
            f"{', '.join(calibrated_by.values())}: this runs the student before ZeRO-3 can gather it. Use ZeRO-2, or "
            "other values for these flags."
        )


def write_calibration(folder: str, calibrated_by: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Leave what the terms have found beside the weights."""
    text = json.dumps({"by": dict(calibrated_by), "found": dict(found)}, indent=1)
    (Path(folder) / CALIBRATION_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: str, calibrated_by: Mapping[str, str]) -> dict[str, Any] | None:
    """What the terms had found when a checkpoint was made; None, and a warning, where it does not say, or where the
    terms were asked for something else (`--resume_anyway`).

    Raises:
        CheckpointError: for a damaged file.
    """
    path = Path(folder) / CALIBRATION_FILE
    again = "It is measured anew, on the weights that the stage starts from."
    if not path.is_file():
        logger.warning(
            "%s was saved by an earlier release, without what was measured before training. %s", folder, again
        )
        return None
    content = read_object(path, CheckpointError)
    if not isinstance(content.get("by"), dict) or not isinstance(content.get("found"), dict):
        raise CheckpointError(f"{path}: must hold `by` and `found`. Remove the file, and it is measured anew.")
    if content["by"] != dict(calibrated_by):
        others = ", ".join(map(str, content["by"].values()))
        logger.warning("%s was made with other flags: %s. %s", path, others, again)
        return None
    logger.info("What was measured before training is taken from %s.", path)
    return content["found"]
