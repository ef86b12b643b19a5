"""The paper's analyses of attention, each from two models and samples to figures: pictures are in `plots`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import torch

from ..errors import DataError
from ..eval.engine import Engine
from ..eval.scoring import batches
from ..eval.sequences import WholeSequences
from ..hosts.llava.model import llava_core
from ..pair.layers import layer_at_equal_depth, match_layers, visual_understanding_layers
from ..record.attention import GroupMeans
from ..record.blend import blended_attention
from ..record.merge import MergeRecorder
from ..record.sight import Inside, by_layer
from .answers import KEYS, answer_attention
from .samples import Sample
from .similarity import all_maps, check_same_places

Progress = Callable[[Sequence[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class Mean:
    """A mean with the half-width of its 95 % interval over samples (normal), and their number."""

    value: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        spread = stdev(values) if len(values) > 1 else 0.0
        return cls(mean(values), 1.96 * spread / math.sqrt(len(values)), len(values))


def _in_batches(samples: Sequence[Sample], engine: Engine, size: int) -> Iterator[dict[str, torch.Tensor]]:
    questions = [sample.asked() for sample in samples]
    return batches(questions, engine.model, engine.tokenizer, version=engine.version, batch_size=size)


def _refuse_other_tokenizers(reference: Engine, model: Engine) -> None:
    """Rows of both are compared one by one, which two tokenizers have no counterparts for.

    Raises:
        DataError: naming a token that both have under other numbers.
    """
    theirs = reference.tokenizer.get_vocab()
    for token, index in model.tokenizer.get_vocab().items():
        if theirs.get(token, index) != index:
            raise DataError(
                f"The checkpoints have different tokenizers (token {token!r} has id {theirs[token]} in the first one "
                f"and {index} in another), so they cannot be compared token by token. Name a teacher with the "
                "student's tokenizer; knockout and overlay look at one model at a time."
            )


def depth_of(engine: Engine) -> int:
    return llava_core(engine.model).config.num_hidden_layers


# ---------------------------------------------------------------------------------------------------------------------
# Similarity by layer (Figures 2 and 9)
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def similarity_by_layer(
    reference: Engine, model: Engine, samples: Sequence[Sample], keys: str = "visual", batch_size: int = 16
) -> list[list[float]]:
    """[samples][layers of `model`]: cosine of both models' attention of the answer over the keys, each layer beside
    the reference's at equal relative depth.

    Raises:
        ValueError: when the models make other sequences of the samples, or for unknown keys.
    """
    if keys not in KEYS:
        raise ValueError(f"keys must be one of {', '.join(KEYS)}, got {keys!r}.")
    _refuse_other_tokenizers(reference, model)
    depth, other = depth_of(model), depth_of(reference)
    partners = [layer_at_equal_depth(layer, depth, other) for layer in range(depth)]
    found: list[list[float]] = []
    pairs = zip(_in_batches(samples, model, batch_size), _in_batches(samples, reference, batch_size), strict=True)
    for mine, theirs in pairs:
        maps, batch = answer_attention(model.model, mine, keys)
        targets, other_batch = answer_attention(reference.model, theirs, keys)
        check_same_places(batch, other_batch)
        cosine = torch.nn.functional.cosine_similarity(maps, targets[partners], dim=-1)
        found += cosine.t().tolist()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Probability of the answer
# ---------------------------------------------------------------------------------------------------------------------
def answer_scores(
    engine: Engine,
    samples: Sequence[Sample],
    batch_size: int = 16,
    inside: Callable[[MergeRecorder], Any] | None = None,
) -> tuple[list[float], list[float]]:
    """For each sample: exp of the mean log-probability of the answer's tokens, and 1 or 0, whether the answer is
    likelier than every wrong one (without wrong ones, whether greedy decoding gives it)."""
    whole = WholeSequences(
        engine.model, engine.tokenizer, version=engine.version, batch_size=batch_size, inside=inside
    )
    asked, owners = [], []
    for place, sample in enumerate(samples):
        for answer in (sample.answer, *sample.wrong):
            asked.append(sample.asked(answer))
            owners.append(place)
    responses: list[list[tuple[float, bool]]] = [[] for _ in samples]
    for owner, response in zip(owners, whole.run(asked), strict=True):
        responses[owner].append(response)
    probabilities = [math.exp(found[0][0]) for found in responses]
    right = [
        float(all(found[0][0] > other[0] for other in found[1:]) if len(found) > 1 else found[0][1])
        for found in responses
    ]
    return probabilities, right


@dataclass(frozen=True)
class Bins:
    """Samples in bins of equal size by similarity.

    Attributes:
        similarity: mean of each bin.
        probability: mean probability of the right answer in each.
        correlation: Spearman's, over samples, with its p-value.
    """

    similarity: list[Mean]
    probability: list[Mean]
    correlation: float
    p: float


def probability_by_similarity(similarities: Sequence[float], probabilities: Sequence[float], bins: int = 10) -> Bins:
    """Figure 3: does a sample's answer become likelier with the similarity of attention?

    Raises:
        ValueError: for fewer samples than bins.
    """
    from scipy.stats import spearmanr

    if len(similarities) < bins:
        raise ValueError(f"{len(similarities)} samples cannot fill {bins} bins: give more samples, or fewer bins.")
    order = sorted(range(len(similarities)), key=similarities.__getitem__)
    parts = [order[place * len(order) // bins : (place + 1) * len(order) // bins] for place in range(bins)]
    result = spearmanr(similarities, probabilities)
    return Bins(
        [Mean.of([similarities[index] for index in part]) for part in parts],
        [Mean.of([probabilities[index] for index in part]) for part in parts],
        float(result.statistic),
        float(result.pvalue),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Intervention (Figure 4)
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Intervention:
    """What the teacher's attention does to a student's answers, by subset ("" for all): accuracy in % without and with
    it, and the paired difference."""

    before: dict[str, Mean] = field(default_factory=dict)
    after: dict[str, Mean] = field(default_factory=dict)
    difference: dict[str, Mean] = field(default_factory=dict)


def intervene(
    teacher: Engine,
    student: Engine,
    samples: Sequence[Sample],
    *,
    band: str | Sequence[int] = "intermediate",
    share: float = 0.5,
    batch_size: int = 16,
) -> Intervention:
    """Answer with the student's attention over the image replaced by the mean of the teacher's and its own."""
    _refuse_other_tokenizers(teacher, student)
    layers = visual_understanding_layers(depth_of(student), band)
    groups = match_layers(layers, visual_understanding_layers(depth_of(teacher), band))
    _, before = answer_scores(student, samples, batch_size)
    after = _blended_answers(teacher, student, samples, layers, groups, share)
    found = Intervention()
    names = sorted({sample.subset for sample in samples} - {""})
    for name in ["", *names]:
        chosen = [place for place, sample in enumerate(samples) if name in ("", sample.subset)]
        found.before[name] = Mean.of([100 * before[place] for place in chosen])
        found.after[name] = Mean.of([100 * after[place] for place in chosen])
        found.difference[name] = Mean.of([100 * (after[place] - before[place]) for place in chosen])
    return found


def _blended_answers(
    teacher: Engine,
    student: Engine,
    samples: Sequence[Sample],
    layers: list[int],
    groups: list[list[int]],
    share: float,
) -> list[float]:
    """As `answer_scores` tells right from wrong. The teacher runs first, and the student's layers receive its maps."""
    right: list[float] = []
    # One sample a time: its answers are a batch, which both models see in one order.
    for sample in samples:
        questions = [sample.asked(answer) for answer in (sample.answer, *sample.wrong)]
        options = {"version": teacher.version, "batch_size": len(questions)}
        (inputs,) = batches(questions, teacher.model, teacher.tokenizer, **options)
        means = GroupMeans(groups)
        maps, batch = all_maps(teacher.model, inputs, means.layers)
        for layer, attention in maps.items():
            means.receive(layer, attention)
        targets = dict(zip(layers, means.means, strict=True))

        def inside(recorder, targets=targets, batch=batch):
            def placed():
                check_same_places(recorder.batch, batch)
                return targets

            return blended_attention(student.model, layers, placed, lambda: recorder.batch, share=share)

        right += answer_scores(student, [sample], len(questions), inside)[1]
    return right


# ---------------------------------------------------------------------------------------------------------------------
# Knock-out
# ---------------------------------------------------------------------------------------------------------------------
def knockout(
    engine: Engine, samples: Sequence[Sample], batch_size: int = 16, progress: Progress | None = None
) -> tuple[tuple[Mean, Mean], list[tuple[Mean, Mean]]]:
    """(accuracy in %, nats an answer token) of the whole model, and with text blind to the image in each layer."""

    def measured(inside: Inside) -> tuple[Mean, Mean]:
        probabilities, right = answer_scores(engine, samples, batch_size, inside)
        costs = [-math.log(max(probability, 1e-30)) for probability in probabilities]
        return Mean.of([100 * value for value in right]), Mean.of(costs)

    layers = range(depth_of(engine))
    return by_layer(engine.model, measured, layers if progress is None else progress(layers, "layers"))
