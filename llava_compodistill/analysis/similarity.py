"""How alike two models look at an image (paper, Section 3.1 and Figures 2 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..eval.scoring import Question, batches
from ..hosts.llava.model import llava_core
from ..losses import attention_similarity
from ..pair.layers import layer_at_equal_depth, match_layers, visual_understanding_layers
from ..record.attention import GroupMeans, capture_visual_attention
from ..record.merge import MergedBatch, record_merge


@dataclass
class Similarity:
    """Cosine similarity of two models' head-averaged attention over the visual tokens.

    Attributes:
        band: mean over the student's band against the matched teacher groups, as L_ADL sees it (1 - L_ADL).
        by_layer: for each student layer, the answer rows' similarity to the teacher layer at equal relative depth, or
            in the band to the mean of the group that is matched with it.
    """

    band: float
    by_layer: list[float]


@torch.inference_mode()
def all_maps(model: nn.Module, inputs: dict[str, torch.Tensor], layers: Sequence[int] | None = None):
    """One forward: ({layer: [B, N, N_v]}, merged batch) for the given layers, all of them when None."""
    core = llava_core(model)
    layers = range(core.config.num_hidden_layers) if layers is None else layers
    with record_merge(core) as recorder, capture_visual_attention(core, layers, lambda: recorder.batch) as capture:
        core.get_model()(**merged_inputs(core, inputs))
        return dict(capture.maps), recorder.batch


def merged_inputs(core: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The backbone's inputs: the head is not needed to see where a model looks."""
    _, position_ids, mask, _, embeds, _ = core.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, inputs.get("attention_mask"), None, inputs.get("labels"), inputs["images"]
    )
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}


def similarity(
    student: nn.Module,
    teacher: nn.Module,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    version: str = "qwen_1_5",
    batch_size: int = 64,
    band: str = "intermediate",
) -> Similarity:
    """Compare a student's attention with its teacher's on question-answer pairs.

    Both models read the same sequences; every real query counts in `band` (as `visual_understanding_layers` takes
    it), the queries that predict the answer in `by_layer`.
    """
    student, teacher = llava_core(student), llava_core(teacher)
    depth, teacher_depth = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    layers = visual_understanding_layers(depth, band)
    groups = match_layers(layers, visual_understanding_layers(teacher_depth, band))
    matched = {layer: [layer_at_equal_depth(layer, depth, teacher_depth)] for layer in range(depth)}
    matched |= dict(zip(layers, groups, strict=True))
    band_sum = torch.zeros(())
    layer_sums = torch.zeros(depth)
    samples = 0
    for inputs in batches(questions, student, tokenizer, version=version, batch_size=batch_size):
        maps, batch = all_maps(student, inputs)
        teacher_maps, teacher_batch = all_maps(teacher, inputs)
        check_same_places(batch, teacher_batch)
        means = GroupMeans(list(matched.values()))
        for layer in means.layers:
            means.receive(layer, teacher_maps[layer])
        targets = dict(zip(matched, means.means, strict=True))
        rows, answers = batch.attention_rows("all"), batch.attention_rows("answer")
        for layer in layers:
            alike = attention_similarity(maps[layer], targets[layer], rows, reduction="none")
            band_sum += alike.sum() / len(layers)
        for layer, target in targets.items():
            layer_sums[layer] += attention_similarity(maps[layer], target, answers, reduction="none").sum()
        samples += len(rows)
    return Similarity(float(band_sum / samples), (layer_sums / samples).tolist())


def check_same_places(student: MergedBatch, teacher: MergedBatch) -> None:
    if not torch.equal(student.visual_index, teacher.visual_index):
        raise ValueError("The models place visual tokens differently: their encoders have other numbers of patches.")
