"""Floating-point operations of a stage, and the time that they take: the formulas.

A product of [m, k] and [k, n] counts 2 m k n. A forward through a weight of a matrix thus counts 2 for each token, the
gradient of its input and that of the weight 2 more each (Kaplan et al., arXiv 2001.08361, Section 2.1; the backward
pass of a trained matrix is twice its forward, that of a frozen one once). Causal attention counts the half of all
pairs that its kernels compute: 2 N^2 H d a layer forward, twice that backward. FlashAttention makes its scores again
in the backward pass, H d N^2. Norms, rotary embeddings and activations are left out. Symbols as in memory.py.

tests/test_plan.py holds these against torch.utils.flop_counter.
"""

from __future__ import annotations

import math

from .configs import LanguageModel, Tower
from .memory import aligned_layers, lora_parameters
from .setup import Models, Setup

#: Memory in GiB, as PyTorch's out-of-memory messages give the total (the data sheets' GB are more), and dense 16-bit
#: tensor-core peaks in TFLOP/s with float32 sums: the vendors' data sheets.
GPUS = {
    "L40S": (44.4, 362.0),
    "A100-40": (39.4, 312.0),
    "A100-80": (79.2, 312.0),
    "H100": (79.1, 989.0),
    "H200": (139.8, 989.0),
    "A6000": (47.5, 154.8),
    "RTX4090": (23.6, 165.2),
}
#: The paper's GPU.
DEFAULT_GPU = "L40S"
#: Share of the peak that is reached, recomputation counted as work. An assumption: training of models like these is
#: published at 30 to 45 % (LMMs-Engine 30-40 % on A800, LLaVA-OneVision-1.5 45 %).
MFU = 0.35
#: float32 runs on the same units as TF32, at half the rate.
RATE = {"bf16": 1.0, "fp16": 1.0, "fp32": 0.5}


def layers_forward(model: LanguageModel, length: float, causal: bool = True) -> float:
    """A sample of N tokens through all decoder layers, without the head: 2 N weights + 2 N^2 H d L."""
    pairs = length**2 * (0.5 if causal else 1.0)
    return 2 * model.matrices * length + 4 * pairs * model.query_size * model.layers


def attention_forward(model: LanguageModel, length: float) -> float:
    """The part of `layers_forward` in attention's own products."""
    return 2 * length**2 * model.query_size * model.layers


def head_forward(model: LanguageModel, rows: float) -> float:
    """R rows of logits: 2 R D V."""
    return 2 * rows * model.embedding


def encoder_forward(tower: Tower) -> float:
    """An image through all layers (LLaVA reads the last but one, and runs all): every token sees every other."""
    places = tower.positions
    layer = 2 * places * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    layer += 4 * places**2 * tower.hidden
    return tower.layers * layer + 2 * tower.patches * 3 * tower.patch**2 * tower.hidden


def map_forward(model: LanguageModel, length: float, visual: int) -> float:
    """One layer's map (ops/visual_attention/kernels.py): scores for the log-sum-exp, H d N^2, and once more at the
    visual keys, 2 N N_v H d."""
    return model.query_size * (length**2 + 2 * length * visual)


def map_backward(model: LanguageModel, length: float, visual: int) -> float:
    """Scores again for D at the visual keys; scores and product for dq, and for dk: H d (4 N^2 + 2 N N_v)."""
    return model.query_size * (4 * length**2 + 2 * length * visual)


def useful(models: Models, setup: Setup, length: float, rows: float) -> float:
    """FLOPs of a sample of N tokens and R answer rows that the method asks for: nothing counted twice."""
    student, visual = models.student, models.tower.patches
    forward = layers_forward(student, length)
    # A frozen matrix has no gradient of its own, but passes that of its input on to the adapter.
    backward = 2 * attention_forward(student, length) + 2 * student.matrices * length * (2 if setup.full else 1)
    if setup.trains_llm and setup.lora_rank:
        lora = 2 * lora_parameters(student, setup.lora_rank) * length
        forward, backward = forward + lora, backward + 2 * lora
    total = forward + backward + head_forward(student, rows) * (3 if setup.full else 2)
    adapter = models.trained_adapter
    total += 6 * visual * (adapter.inputs * adapter.outputs + (adapter.depth - 1) * adapter.outputs**2)
    total += encoder_forward(models.tower)
    if models.taf or setup.has_teacher:
        fetched = models.teacher_adapter
        total += 2 * visual * (fetched.inputs * fetched.outputs + (fetched.depth - 1) * fetched.outputs**2)
    if setup.has_teacher:
        total += layers_forward(models.teacher, length)
        total += encoder_forward(models.teacher_tower) if models.teacher_tower else 0.0
    if setup.distils:
        total += head_forward(models.teacher, rows)
    if setup.aligns:
        layers, groups = aligned_layers(models)
        used = {layer for group in groups for layer in group}
        total += len(layers) * (map_forward(student, length, visual) + map_backward(student, length, visual))
        total += len(used) * map_forward(models.teacher, length, visual)
    return total


def executed(models: Models, setup: Setup, length: float, rows: float) -> float:
    """`useful`, and what is computed again: the layers under gradient checkpointing, maps with them; attention's
    scores in its backward pass; the head's logits for the gradient of a 16-bit head."""
    student = models.student
    again = attention_forward(student, length) / 2
    if setup.checkpointing:
        again += layers_forward(student, length)
        if setup.trains_llm and setup.lora_rank:
            again += 2 * lora_parameters(student, setup.lora_rank) * length
        if setup.aligns:
            again += len(aligned_layers(models)[0]) * map_forward(student, length, models.tower.patches)
    if setup.full and setup.trained < 4:
        again += head_forward(student, rows)
        again += head_forward(models.teacher, rows) if setup.distils else 0.0
    return useful(models, setup, length, rows) + again


def steps(samples: int, global_batch: int, epochs: float = 1.0) -> int:
    """Optimizer steps: the last, smaller batch makes one, too."""
    return math.ceil(samples * epochs / global_batch)
